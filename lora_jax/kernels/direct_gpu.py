"""Dequantisation of 4-bit codes on Hopper: threads at device memory.

A thread takes some byte rows of one block by 8 neighbouring columns: it asks
for all its bytes and scales at once, and stores 16 bytes, 8 values of a row,
at a time. A warp's accesses are 256 bytes of codes and 512 of weights in one
row. Nothing passes through shared memory and nobody waits for anyone, so that
as many loads are in flight as there are threads.

The level of a code is what lane `code` of the warp holds: one shuffle. The
product, the conversion of two values at once and a shift are the rest, 3.6
instructions a value where a tree of selects has 20.

Mosaic's own loads and stores lose the alignment of addresses; hence PTX, which
`ptx.interpret` runs where there is no GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

from lora_jax import errors
from lora_jax.kernels import decode
from lora_jax.kernels import ptx

WARPGROUP = 128
_CONVERSIONS = {jnp.dtype(jnp.bfloat16): "cvt.rn.bf16x2.f32",
                jnp.dtype(jnp.float16): "cvt.rn.f16x2.f32"}


@dataclasses.dataclass(frozen=True)
class Variant:
  """How the work is cut; every variant computes the same bits.

  Attributes:
    rows: byte rows of a thread, at most; they divide the half of a block.
    columns: of a thread: 4, 8 or 16.
    warpgroups: of 128 threads in a block of threads.
    decode: how a code becomes its level, a key of `LOOKUPS`.
    ahead: byte rows that are loaded before the first is decoded; 0 is all.
    load: cache operators of loads of codes, e.g. `".L1::no_allocate"`.
    store: the same of stores of weights, e.g. `".cs"`.
  """

  rows: int = 8
  columns: int = 8
  warpgroups: int = 1
  decode: str = "shuffle"
  ahead: int = 0
  load: str = ".L1::no_allocate"
  store: str = ""


DEFAULT = Variant()


@dataclasses.dataclass(frozen=True)
class Shape:
  """What is static of a call: `layers` are those of the result."""

  layers: int
  byte_rows: int
  columns: int
  half: int
  dtype: Any
  minimums: bool = False
  nested: bool = False
  layer: bool = False

  @property
  def blocks(self) -> int:
    return self.byte_rows // self.half

  def threads(self, variant: Variant) -> int:
    return (self.layers * self.byte_rows // _rows(variant, self.half)
            * (self.columns // variant.columns))


def _rows(variant: Variant, half: int) -> int:
  return math.gcd(variant.rows, half)


def applies(
    rows: int,
    columns: int,
    block_size: int,
    dtype: Any,
    variant: Variant = DEFAULT,
) -> bool:
  """Whether the kernel takes a weight `[rows, columns]`: whole blocks, whole
  threads' columns, and a type of 16 bits."""
  return (rows % block_size == 0 and columns % variant.columns == 0
          and _rows(variant, block_size // 2) > 1
          and jnp.dtype(dtype) in _CONVERSIONS)


class _Levels:
  """Emits the level of the code at bit `shift` of a word."""

  def __init__(self, p: ptx.Program, levels: decode.Levels):
    self.p, self.levels = p, levels

  def shifted(self, word: str, shift: int) -> str:
    return self.p.do("shr.u32", word, shift) if shift else word

  def __call__(self, word: str, shift: int) -> str:
    raise TypeError("the protocol, not a lookup")


class _Select(_Levels):
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


class _Shuffle(_Levels):
  """Lane `code` of each half of the warp holds the level; the instruction
  itself ignores the bits above."""

  def __init__(self, p: ptx.Program, levels: decode.Levels):
    super().__init__(p, levels)
    lane = p.do("mov.u32", "%laneid")
    self.table = _Select(p, levels).among(lane)

  def __call__(self, word: str, shift: int) -> str:
    return self.p.do("shfl.sync.idx.b32", self.table,
                     self.shifted(word, shift), 16 << 8 | 31, ptx.ALL)


class _Arithmetic(_Levels):
  """Levels `first + code`: the code is put into the fraction of 2^23, from
  which one exact multiply-add makes the level. The word is shifted once, for
  the codes that lie above the fraction."""

  def __init__(self, p: ptx.Program, levels: decode.Levels):
    super().__init__(p, levels)
    self.first, self.upper = levels[0], {}
    self.magic = ptx.bits(2.0**23)
    self.constants = {
        shift: (p.constant(2.0**-shift),
                p.constant(self.first - 2.0 ** (23 - shift)))
        for shift in (0, 4, 8, 12)}

  def __call__(self, word: str, shift: int) -> str:
    p = self.p
    if shift >= 16:
      if word not in self.upper:
        self.upper[word] = p.do("shr.u32", word, 16)
      word, shift = self.upper[word], shift - 16
    # (word & mask) | magic
    large = p.do("lop3.b32", word, 15 << shift, self.magic, 0xEA)
    return p.do("fma.rn.f32", large, *self.constants[shift])


LOOKUPS: dict[str, type[_Levels]] = {
    "shuffle": _Shuffle, "select": _Select, "arithmetic": _Arithmetic}


def lookup(name: str, levels: decode.Levels) -> type[_Levels]:
  """The lookup `name`, or the shuffle where it cannot make these levels."""
  errors.choose("decode", name, LOOKUPS)
  first = levels[0]
  steady = levels == tuple(first + k for k in range(16))
  if name == "arithmetic" and not (steady and first == int(first)):
    return _Shuffle
  return LOOKUPS[name]


def _loads(p: ptx.Program, address: str, offset: int, words: int,
           how: str = "") -> list[str]:
  """Words by accesses of at most 16 bytes."""
  return [register for k in range(0, words, 4)
          for register in p.load(
              address, offset + 4 * k, min(4, words - k), how)]


def _unnested(p: ptx.Program, operands: list[str], shape: Shape, count: int,
              layer: str, block: str, row: str, column: str) -> list[str]:
  """Statistics of neighbouring columns from their 8-bit codes.

  See `quant.double`: `map[code] * absmax[number // 256] + offset`, where the
  number of a value in its layer is `column * blocks + block`.

  Args:
    operands: addresses of codes `[l, q, o]`, absmax `[l, n]`, offset `[l]` and
      the map `[256]`.
    layer: which one to read.
    block: which one in the layer.
    row: which one of all layers, as the codes lie.
  """
  codes, absmax, offset, table = operands
  every = -(-shape.blocks * shape.columns // 256)
  words = _loads(p, p.at(p.at(codes, row, shape.columns), column, 1), 0,
                 count // 4)
  absmax = p.at(absmax, layer, 4 * every)
  (mean,) = p.load(p.at(offset, layer, 4))
  least = p.constant(-3e38)
  found = []
  for k in range(count):
    code = p.do("and.b32", p.do("shr.u32", words[k // 4], k % 4 * 8), 255)
    (value,) = p.load(p.at(table, code, 4))
    number = p.do("mad.lo.u32", p.do("add.u32", column, k), shape.blocks,
                  block)
    (scale,) = p.load(p.at(absmax, p.do("shr.u32", number, 8), 4))
    product = p.do("mul.rn.f32", value, scale)
    found.append(p.do("add.rn.f32", p.do("max.NaN.f32", product, least), mean))
  return found


@functools.cache
def program(
    shape: Shape, levels: decode.Levels, variant: Variant
) -> ptx.Program:
  """What a thread does.

  Operands are codes `[l, i / 2, o]`; for each statistic float32 `[l, q, o]`,
  or what `_unnested` takes less the map; the map if anything is nested; int32
  `[1]`, the layer to read, if there is one; and the result `[l, i, o]`.
  """
  rows, width, half = _rows(variant, shape.half), variant.columns, shape.half
  kinds = 2 if shape.minimums else 1
  each = 3 if shape.nested else 1
  count = 1 + kinds * each + shape.nested + shape.layer + 1
  p = ptx.Program(count)
  operands = [p.operand(n) for n in range(count)]
  codes, out = operands[0], operands[-1]

  thread = p.do("mad.lo.u32", p.do("mov.u32", "%ctaid.x"),
                WARPGROUP * variant.warpgroups, p.do("mov.u32", "%tid.x"))
  # Threads past the end repeat the last one's work: all lanes must shuffle.
  thread = p.do("min.u32", thread, shape.threads(variant) - 1)
  across = shape.columns // width
  part = p.divide(thread, across)
  column = p.do("mul.lo.u32", p.do(
      "sub.u32", thread, p.do("mul.lo.u32", part, across)), width)
  # Rows and blocks are numbered through all layers.
  block = p.divide(part, half // rows)
  row = p.do("mul.lo.u32", part, rows)
  read_row, read_block = row, block
  layer = within = ""
  if shape.nested:
    layer = p.divide(block, shape.blocks)
    within = p.do("sub.u32", block, p.do("mul.lo.u32", layer, shape.blocks))
  if shape.layer:
    (layer,) = p.load(operands[-2])
    read_row = p.do("mad.lo.u32", layer, shape.byte_rows, row)
    read_block = p.do("mad.lo.u32", layer, shape.blocks, block)

  source = p.at(p.at(codes, read_row, shape.columns), column, 1)

  def fetch(r):
    return _loads(
        p, source, r * shape.columns, width // 4, variant.load)

  ahead = min(variant.ahead or rows, rows)
  fetched = [fetch(r) for r in range(ahead)]
  statistics = []
  for kind in range(kinds):
    mine = operands[1 + kind * each : 1 + (kind + 1) * each]
    if shape.nested:
      statistics.append(_unnested(
          p, [*mine, operands[1 + kinds * each]], shape, width, layer, within,
          read_block, column))
    else:
      at = p.at(p.at(mine[0], read_block, 4 * shape.columns), column, 4)
      statistics.append(_loads(p, at, 0, width))
  scales, minimums = (*statistics, None)[:2]

  level = lookup(variant.decode, levels)(p, levels)
  least = p.constant(-3e38) if minimums else ""
  convert = _CONVERSIONS[shape.dtype]
  pitch = 2 * shape.columns
  # Low nibbles of byte row `r` of a block are row `r`, high ones `r + half`.
  low = p.do("mad.lo.u32", block, half, row)
  target = p.at(p.at(out, low, pitch), column, 2)
  for r in range(rows):
    if ahead + r < rows:
      fetched.append(fetch(ahead + r))
    for k in range(2):
      values = []
      for c in range(width):
        value = level(fetched[r][c // 4], c % 4 * 8 + 4 * k)
        value = p.do("mul.rn.f32", value, scales[c])
        if minimums:
          value = p.do("max.NaN.f32", value, least)
          value = p.do("add.rn.f32", value, minimums[c])
        values.append(value)
      pairs = [p.do(convert, high, low_) for low_, high in zip(
          values[::2], values[1::2], strict=True)]
      for n in range(0, len(pairs), 4):
        p.store(target, pairs[n : n + 4], (r + k * half) * pitch + 4 * n,
                variant.store)
  return p


def _launch(p: ptx.Program, blocks: int, warpgroups: int, out_type: Any):
  """The program as a kernel of its arrays."""

  def dequantise_direct(*refs):
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
    def run(_, *memrefs):
      # MLIR is imported where it is built: interpreting needs none.
      from jax._src.lib.mlir import ir
      from jax._src.lib.mlir.dialects import llvm
      from jax.experimental.mosaic.gpu import utils

      wide = ir.IntegerType.get_signless(64)
      pointers = [llvm.ptrtoint(wide, utils.memref_ptr(m)) for m in memrefs]
      llvm.inline_asm(
          ir.Type.parse("!llvm.void"), pointers, p.text(),
          ",".join("l" * len(pointers)), has_side_effects=True)

    run(*refs)

  return plgpu.kernel(
      dequantise_direct, out_type=out_type, grid=(blocks,),
      grid_names=("block",), num_threads=warpgroups, thread_name="warpgroup")


def dequantise(
    codes: jax.Array,
    *statistics: Any,
    levels: decode.Levels,
    block_size: int,
    dtype: Any,
    interpret: bool = False,
    table: jax.Array | None = None,
    layer: jax.Array | None = None,
    variant: Variant = DEFAULT,
) -> jax.Array:
  """The weights `[l, i, o]` in `dtype`.

  Args:
    codes: uint8 `[l, i / 2, o]`, two codes a byte.
    *statistics: scales, and minimums if there are any: float32 `[l, q, o]`, or
      all of them triples of 8-bit codes `[l, q, o]`, float32 `[l, n]` and
      `[l]` (see `quant.double.Nested`).
    levels: what a code stands for, before it is scaled.
    block_size: rows of a block.
    dtype: of the result, of 16 bits.
    interpret: True to run without a GPU.
    table: float32 `[256]`, the values of 8-bit codes, if there are any.
    layer: int32 `[]`: the only one to read, straight out of the stack.
    variant: how the work is cut.

  Returns:
    `levels[code] * scale (+ minimum)`; one layer if `layer` is given. See
    `applies` for what shapes.
  """
  layers, byte_rows, columns = codes.shape
  shape = Shape(
      layers if layer is None else 1, byte_rows, columns, block_size // 2,
      jnp.dtype(dtype), len(statistics) > 1, table is not None,
      layer is not None)
  arrays = [codes, *jax.tree.leaves(statistics)]
  if table is not None:
    arrays.append(table)
  if layer is not None:
    arrays.append(jnp.reshape(layer, 1).astype(jnp.int32))
  p = program(shape, levels, variant)
  threads = WARPGROUP * variant.warpgroups
  blocks = -(-shape.threads(variant) // threads)
  out_type = jax.ShapeDtypeStruct(
      (shape.layers, 2 * byte_rows, columns), shape.dtype)
  if not interpret:
    return _launch(p, blocks, variant.warpgroups, out_type)(*arrays)

  def run(*arrays):
    return ptx.interpret(
        p, [np.asarray(x) for x in arrays],
        np.empty(out_type.shape, out_type.dtype), blocks, threads)

  return jax.pure_callback(run, out_type, *arrays)
