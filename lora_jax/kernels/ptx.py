"""Small PTX programs: built, printed for a GPU, and run by numpy.

A program is what one thread does, without branches but for loops that all
threads go through equally often. It is kept as a list of
instructions, so that the text that a GPU runs and what `interpret` computes
for all threads at once are the same program. Only the instructions that the
kernels use are known; their meaning is that of NVIDIA's "PTX ISA" manual.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import contextlib
import struct
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

LANES = 32
ALL = 0xFFFFFFFF  # The mask of a warp.
# Registers: 32 bits, addresses, and predicates.
_KINDS = {"w": ".b32", "a": ".b64", "q": ".pred"}


class Instruction(NamedTuple):
  """`op out, args`; several outputs or stored registers are a vector."""

  op: str
  out: tuple[str, ...]
  args: tuple[Any, ...]  # Registers, integers; of stores the values are last.


def bits(value: float) -> int:
  """The 32 bits of a float."""
  return struct.unpack("<I", struct.pack("<f", value))[0]


class Program:
  """Instructions in order; every result gets a register of its own.

  Attributes:
    code: the instructions.
    operands: how many arrays the program is given pointers to.
  """

  def __init__(self, operands: int):
    self.code: list[Instruction] = []
    self.operands = operands
    self._used = dict.fromkeys(_KINDS, 0)

  def _new(self, kind: str) -> str:
    self._used[kind] += 1
    return f"{kind}{self._used[kind] - 1}"

  def do(self, op: str, *args: Any, kind: str = "w") -> str:
    """Appends `op`, and returns the register of its result."""
    out = self._new(kind)
    self.code.append(Instruction(op, (out,), args))
    return out

  def constant(self, value: float) -> str:
    """A register that holds a float."""
    return self.do("mov.b32", bits(value))

  @contextlib.contextmanager
  def loop(self, count: int) -> Iterator[str]:
    """What is appended inside is done `count` times; gives the counter."""
    counter = self.do("mov.b32", 0)
    start = len(self.code)
    yield counter
    again = self._new("q")
    self.code.append(Instruction("loop", (counter, again), (count, start)))

  def move(self, to: str, source: str) -> None:
    """Gives a register another value: what a loop carries on."""
    size = "mov.b64" if to.startswith("a") else "mov.b32"
    self.code.append(Instruction(size, (to,), (source,)))

  def operand(self, number: int) -> str:
    """The address of an array."""
    return self.do("cvta.to.global.u64", f"${number}", kind="a")

  def divide(self, x: str, by: int) -> str:
    """`x // by` of an `x` below 2^31.

    Neither LLVM, which leaves inline assembly alone, nor ptxas replaces a
    division by a constant. Above, `x * ceil(2^(31 + s) / by) >> 31 + s` with
    `2^s >= by` is exact (Granlund and Montgomery 1994, theorem 4.2).
    """
    s = (by - 1).bit_length()
    if by == 1 << s:
      return self.do("shr.u32", x, s) if s else x
    high = self.do("mul.hi.u32", x, -(-(1 << 31 + s) // by))
    return self.do("shr.u32", high, s - 1)

  def at(self, base: str, index: str, size: int) -> str:
    """The address `base + index * size` of an unsigned index."""
    return self.do("mad.wide.u32", index, size, base, kind="a")

  def load(
      self, address: str, offset: int = 0, words: int = 1, how: str = ""
  ) -> list[str]:
    """Words from an address that is aligned to all of them."""
    vector = f".v{words}" if words > 1 else ""
    out = tuple(self._new("w") for _ in range(words))
    self.code.append(Instruction(
        f"ld.global.nc{how}{vector}.b32", out, (address, offset)))
    return list(out)

  def store(
      self, address: str, values: Sequence[str], offset: int = 0,
      how: str = "",
  ) -> None:
    """Words to an address that is aligned to all of them."""
    vector = f".v{len(values)}" if len(values) > 1 else ""
    self.code.append(Instruction(
        f"st.global{how}{vector}.b32", (), (address, offset, *values)))

  def text(self) -> str:
    """One block of inline assembly; `$0`, `$1` ... are the pointers."""
    lines = [f".reg {type_} {kind}<{self._used[kind]}>;"
             for kind, type_ in _KINDS.items() if self._used[kind]]
    starts = {i.args[1] for i in self.code if i.op == "loop"}
    for n, instruction in enumerate(self.code):
      if n in starts:
        lines.append(f"L{n}:")
      lines.append(_line(instruction))
    return "\n".join(["{", *lines, "}"])


def _group(registers: Sequence[str]) -> str:
  joined = ", ".join(registers)
  return f"{{{joined}}}" if len(registers) > 1 else joined


def _line(instruction: Instruction) -> str:
  op, out, args = instruction
  if op == "loop":
    counter, again = out
    return (f"add.u32 {counter}, {counter}, 1;\n"
            f"setp.lt.u32 {again}, {counter}, {args[0]};\n"
            f"@{again} bra L{args[1]};")
  if op.startswith("ld."):
    return f"{op} {_group(out)}, [{args[0]}+{args[1]}];"
  if op.startswith("st."):
    return f"{op} [{args[0]}+{args[1]}], {_group(args[2:])};"
  return f"{op} {', '.join([*out, *map(str, args)])};"


def _f(x: Any) -> np.ndarray:
  return np.asarray(x, np.uint32).view(np.float32)


def _w(x: Any) -> np.ndarray:
  return np.asarray(x, np.float32).view(np.uint32)


def _shuffle(value, lane, clamp, mask):
  assert mask == ALL and clamp & 31 == 31
  segment = clamp >> 8
  own = np.arange(LANES)
  asked = lane.reshape(-1, LANES).astype(np.int64) & 31
  source = own & segment | asked & ~segment
  return np.take_along_axis(
      value.reshape(-1, LANES), source, axis=1).reshape(-1)


def _pack(dtype: Any) -> Callable[..., np.ndarray]:
  def pack(high, low):
    h, l = (_f(x).astype(dtype).view(np.uint16).astype(np.uint32)
            for x in (high, low))
    return h << 16 | l

  return pack


def _logic(a, b, c, table):
  """`lop3`: bit `4 a + 2 b + c` of the table, for each bit."""
  out = np.zeros_like(a)
  for k in range(8):
    if table >> k & 1:
      terms = (x if k & bit else ~np.asarray(x, np.uint32)
               for x, bit in ((a, 4), (b, 2), (c, 1)))
      x, y, z = terms
      out |= x & y & z
  return out


def _fma(a, b, c):
  # The kernels' sums are exact in float64.
  return _w((_f(a).astype(np.float64) * _f(b) + _f(c)).astype(np.float32))


_MEANING: dict[str, Callable[..., Any]] = {
    "mad.lo.u32": lambda a, b, c: a * np.uint32(b) + c,
    "mul.lo.u32": lambda a, b: a * np.uint32(b),
    "sub.u32": lambda a, b: a - b,
    "add.u32": lambda a, b: a + np.asarray(b, np.uint32),
    "min.u32": lambda a, b: np.minimum(a, np.uint32(b)),
    "mul.hi.u32": lambda a, b: (
        a.astype(np.uint64) * np.uint64(b) >> np.uint64(32)).astype(np.uint32),
    "shr.u32": lambda a, b: a >> np.uint32(b),
    "and.b32": lambda a, b: a & np.uint32(b),
    "lop3.b32": _logic,
    "setp.ne.u32": lambda a, b: a != b,
    "selp.b32": lambda a, b, p: np.where(p, np.uint32(a), np.uint32(b)),
    "shfl.sync.idx.b32": _shuffle,
    "mul.rn.f32": lambda a, b: _w(_f(a) * _f(b)),
    "add.rn.f32": lambda a, b: _w(_f(a) + _f(b)),
    "fma.rn.f32": _fma,
    "max.NaN.f32": lambda a, b: _w(np.maximum(_f(a), _f(b))),
    "cvt.rn.bf16x2.f32": _pack(jnp.bfloat16),
    "cvt.rn.f16x2.f32": _pack(np.float16),
}


def grid(blocks: int, threads: int) -> dict[str, np.ndarray]:
  """The special registers of all threads of a one-dimensional grid."""
  number = np.arange(blocks * threads, dtype=np.uint32)
  return {"%ctaid.x": number // np.uint32(threads),
          "%tid.x": number % np.uint32(threads),
          "%laneid": number % np.uint32(LANES)}


def interpret(
    program: Program,
    arrays: Sequence[np.ndarray],
    out: np.ndarray,
    special: dict[str, np.ndarray],
) -> np.ndarray:
  """What the program's threads, all at once, leave in `out`.

  Args:
    program: whose operands are `arrays` and then `out`.
    arrays: what it reads, contiguous.
    out: what it writes, contiguous; changed in place.
    special: what the special registers hold, by thread; see `grid`.

  Returns:
    `out`.

  Raises:
    AssertionError: if an access is not aligned to its width.
    IndexError: if one lies past an array's end.
  """
  state: dict[str, Any] = dict(special)
  shape = special["%tid.x"].shape
  memory = [np.ascontiguousarray(x).reshape(-1).view(np.uint8)
            for x in (*arrays, out)]

  def value(x):
    return state[x] if isinstance(x, str) else x

  def places(address, offset, count):
    which, where = state[address]
    where = where + offset
    assert not (where % (4 * count)).any(), "misaligned"
    return memory[which].view(np.uint32), where // 4

  n = 0
  while n < len(program.code):
    op, results, args = program.code[n]
    n += 1
    if op == "loop":
      state[results[0]] = state[results[0]] + np.uint32(1)
      if state[results[0]].flat[0] < args[0]:
        n = args[1]
    elif op == "mov.b64":
      state[results[0]] = state[args[0]]
    elif op == "cvta.to.global.u64":
      state[results[0]] = int(args[0][1:]), np.zeros(shape, np.int64)
    elif op == "mad.wide.u32":
      which, where = state[args[2]]
      step = value(args[0]).astype(np.int64) * args[1]
      state[results[0]] = which, where + step
    elif op.startswith("mov."):
      state[results[0]] = np.broadcast_to(
          np.asarray(value(args[0]), np.uint32), shape)
    elif op.startswith("ld."):
      words, where = places(args[0], args[1], len(results))
      for k, register in enumerate(results):
        state[register] = words[where + k]
    elif op.startswith("st."):
      words, where = places(args[0], args[1], len(args) - 2)
      for k, register in enumerate(args[2:]):
        words[where + k] = state[register]
    else:
      with np.errstate(all="ignore"):
        found = _MEANING[op](*map(value, args))
      state[results[0]] = np.broadcast_to(found, shape)
  return out
