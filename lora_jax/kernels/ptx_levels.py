"""Levels of 4-bit codes in PTX.

Counted in the machine code for Hopper, a value costs 0.9 shifts and one
shuffle; or 0.9 shifts and 11 selects; or 1.2 logic instructions and one
multiply-add. The product and half a conversion come on top. Logic and selects
run at half the rate of products, shuffles at a quarter.
"""

from __future__ import annotations

from typing import Any

from lora_jax import errors
from lora_jax.kernels import decode
from lora_jax.kernels import ptx


class Lookup:
  """Emits the level of the code at bit `shift` of a word."""

  def __init__(self, p: ptx.Program, levels: decode.Levels):
    self.p, self.levels = p, levels

  def shifted(self, word: str, shift: int) -> str:
    return self.p.do("shr.u32", word, shift) if shift else word

  def __call__(self, word: str, shift: int) -> str:
    raise TypeError("the protocol, not a lookup")


class Select(Lookup):
  """A tree of selects over the code's bits."""

  def among(self, code: str) -> str:
    found: list[Any] = [ptx.bits(v) for v in self.levels]
    for k in range(4):
      bit = self.p.do("and.b32", code, 1 << k)
      is_set = self.p.do("setp.ne.u32", bit, 0, kind="q")
      found = [self.p.do("selp.b32", high, low, is_set)
               for low, high in zip(found[::2], found[1::2], strict=True)]
    return found[0]

  def __call__(self, word: str, shift: int) -> str:
    return self.among(self.shifted(word, shift))


class Shuffle(Lookup):
  """Lane `code` of each half of the warp holds the level; the instruction
  itself ignores the bits above."""

  def __init__(self, p: ptx.Program, levels: decode.Levels):
    super().__init__(p, levels)
    lane = p.do("mov.u32", "%laneid")
    self.table = Select(p, levels).among(lane)

  def __call__(self, word: str, shift: int) -> str:
    return self.p.do("shfl.sync.idx.b32", self.table,
                     self.shifted(word, shift), 16 << 8 | 31, ptx.ALL)


class Arithmetic(Lookup):
  """Levels `first + code`: the code is put into the fraction of 2^23, from
  which one exact multiply-add makes the level. The word is shifted once, for
  the codes that lie above the fraction."""

  def __init__(self, p: ptx.Program, levels: decode.Levels):
    super().__init__(p, levels)
    self.first = levels[0]
    self.magic = ptx.bits(2.0**23)
    self.constants = {
        shift: (p.constant(2.0**-shift),
                p.constant(self.first - 2.0 ** (23 - shift)))
        for shift in (0, 4, 8, 12)}

  def __call__(self, word: str, shift: int) -> str:
    p = self.p
    if shift >= 16:
      # The assembler sees that it is one for four codes.
      word, shift = p.do("shr.u32", word, 16), shift - 16
    # (word & mask) | magic
    large = p.do("lop3.b32", word, 15 << shift, self.magic, 0xEA)
    return p.do("fma.rn.f32", large, *self.constants[shift])


LOOKUPS: dict[str, type[Lookup]] = {
    "shuffle": Shuffle, "select": Select, "arithmetic": Arithmetic}


def lookup(name: str, levels: decode.Levels) -> type[Lookup]:
  """The lookup `name`, or the shuffle where it cannot make these levels."""
  errors.choose("decode", name, LOOKUPS)
  first = levels[0]
  steady = levels == tuple(first + k for k in range(16))
  if name == "arithmetic" and not (steady and first == int(first)):
    return Shuffle
  return LOOKUPS[name]
