"""What a thread of `direct_gpu` does, as a program.

A thread has some byte rows of one block by a few neighbouring columns; see
`program` for what it is given.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax.numpy as jnp

from lora_jax.kernels import decode
from lora_jax.kernels import ptx
from lora_jax.kernels import ptx_levels

WARPGROUP = 128
RESIDENT = 132 * 384  # Threads of an H100, with 168 registers each.
CONVERSIONS = {jnp.dtype(jnp.bfloat16): "cvt.rn.bf16x2.f32",
               jnp.dtype(jnp.float16): "cvt.rn.f16x2.f32"}


@dataclasses.dataclass(frozen=True)
class Variant:
  """How the work is cut; every variant computes the same bits.

  Attributes:
    rows: byte rows of a thread, at most; they divide the half of a block.
    columns: of a thread: 4, 8 or 16.
    warpgroups: of 128 threads in a block of threads.
    decode: how a code becomes its level, a key of `ptx_levels.LOOKUPS`.
    ahead: byte rows that are loaded before the first is decoded; 0 is all.
    steps: tiles that a thread takes in turn, a grid apart, the next one's
      loads issued before this one is decoded; 0 is as many as make all blocks
      of threads resident at once.
    load: cache operators of loads of codes, e.g. `".L1::no_allocate"`.
    store: the same of stores of weights, e.g. `".cs"`.
  """

  rows: int = 8
  columns: int = 8
  warpgroups: int = 1
  decode: str = "shuffle"
  ahead: int = 0
  steps: int = 1
  load: str = ".L1::no_allocate"
  store: str = ""


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
  below: int = 0  # Rows of the result after each layer's weight.

  @property
  def blocks(self) -> int:
    return self.byte_rows // self.half

  def tiles(self, variant: Variant) -> int:
    """What there is to do, in threads' portions."""
    return (self.layers * self.byte_rows // byte_rows(variant, self.half)
            * (self.columns // variant.columns))

  def grid(self, variant: Variant) -> tuple[int, int]:
    """Blocks of threads, and the tiles of each thread."""
    size = WARPGROUP * variant.warpgroups
    blocks = -(-self.tiles(variant) // size)
    steps = variant.steps or -(-blocks * size // RESIDENT)
    return -(-blocks // steps), steps


def byte_rows(variant: Variant, half: int) -> int:
  """Of a tile: all in one block."""
  return math.gcd(variant.rows, half)


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


class _Tile:
  """Where one tile lies, and what was loaded of it."""

  def __init__(self, p: ptx.Program, shape: Shape, variant: Variant,
               operands: list[str], number: str):
    self.p, self.shape, self.variant = p, shape, variant
    rows, width = byte_rows(variant, shape.half), variant.columns
    across = shape.columns // width
    part = p.divide(number, across)
    column = p.do("mul.lo.u32", p.do(
        "sub.u32", number, p.do("mul.lo.u32", part, across)), width)
    # Rows and blocks are numbered through all layers.
    block = p.divide(part, shape.half // rows)
    row = p.do("mul.lo.u32", part, rows)
    # Low nibbles of byte row `r` of a block are row `r`, high ones `r + half`.
    low = p.do("mad.lo.u32", block, shape.half, row)
    if shape.below and shape.layers > 1:
      low = p.do("mad.lo.u32", p.divide(block, shape.blocks), shape.below, low)
    self.target = p.at(p.at(operands[-1], low, 2 * shape.columns), column, 2)

    layer = within = ""
    if shape.nested:
      layer = p.divide(block, shape.blocks)
      within = p.do("sub.u32", block, p.do("mul.lo.u32", layer, shape.blocks))
    if shape.layer:
      (layer,) = p.load(operands[-2])
      row = p.do("mad.lo.u32", layer, shape.byte_rows, row)
      block = p.do("mad.lo.u32", layer, shape.blocks, block)
    self.source = p.at(p.at(operands[0], row, shape.columns), column, 1)
    self.rows: list[list[str]] = []
    for _ in range(min(variant.ahead or rows, rows)):
      self.fetch()
    each = 3 if shape.nested else 1
    kinds = 2 if shape.minimums else 1
    self.statistics = []
    for mine in (operands[1 + k * each : 1 + (k + 1) * each]
                 for k in range(kinds)):
      if shape.nested:
        self.statistics.append(_unnested(
            p, [*mine, operands[1 + kinds * each]], shape, width, layer,
            within, block, column))
      else:
        at = p.at(p.at(mine[0], block, 4 * shape.columns), column, 4)
        self.statistics.append(_loads(p, at, 0, width))

  def fetch(self) -> None:
    """Asks for the next byte row, if there is one."""
    n = len(self.rows)
    if n < byte_rows(self.variant, self.shape.half):
      self.rows.append(_loads(
          self.p, self.source, n * self.shape.columns,
          self.variant.columns // 4, self.variant.load))

  def adopt(self, other: _Tile) -> None:
    """Takes over where the other lies, and what was loaded of it."""
    mine, its = (
        [t.source, t.target, *itertools.chain(*t.rows, *t.statistics)]
        for t in (self, other))
    for to, source in zip(mine, its, strict=True):
      self.p.move(to, source)

  def decode(self, level: ptx_levels.Lookup, least: str) -> None:
    p, shape = self.p, self.shape
    convert, pitch = CONVERSIONS[shape.dtype], 2 * shape.columns
    scales, minimums = self.statistics[0], self.statistics[1:]
    asked = len(self.rows)
    for r in range(byte_rows(self.variant, shape.half)):
      self.fetch()
      for k in range(2):
        values = []
        for c in range(self.variant.columns):
          value = level(self.rows[r][c // 4], c % 4 * 8 + 4 * k)
          value = p.do("mul.rn.f32", value, scales[c])
          if minimums:
            value = p.do("max.NaN.f32", value, least)
            value = p.do("add.rn.f32", value, minimums[0][c])
          values.append(value)
        pairs = [p.do(convert, high, low) for low, high in zip(
            values[::2], values[1::2], strict=True)]
        for n in range(0, len(pairs), 4):
          p.store(self.target, pairs[n : n + 4],
                  (r + k * shape.half) * pitch + 4 * n, self.variant.store)
    del self.rows[asked:]


@functools.cache
def program(
    shape: Shape, levels: decode.Levels, variant: Variant
) -> ptx.Program:
  """What a thread does.

  Operands are codes `[l, i / 2, o]`; for each statistic float32 `[l, q, o]`,
  or what `_unnested` takes less the map; the map if anything is nested; int32
  `[1]`, the layer to read, if there is one; and the result `[l, i, o]`.
  """
  kinds, each = 2 if shape.minimums else 1, 3 if shape.nested else 1
  count = 1 + kinds * each + shape.nested + shape.layer + 1
  p = ptx.Program(count)
  operands = [p.operand(n) for n in range(count)]
  size = WARPGROUP * variant.warpgroups
  blocks, steps = shape.grid(variant)
  thread = p.do("mad.lo.u32", p.do("mov.u32", "%ctaid.x"), size,
                p.do("mov.u32", "%tid.x"))

  def tile(number):
    # Past the end the last tile is done again: all lanes must shuffle.
    number = p.do("min.u32", number, shape.tiles(variant) - 1)
    return _Tile(p, shape, variant, operands, number)

  level = ptx_levels.lookup(variant.decode, levels)(p, levels)
  least = p.constant(-3e38) if shape.minimums else ""
  current = tile(thread)
  if steps > 1:
    with p.loop(steps - 1):
      thread_next = p.do("add.u32", thread, blocks * size)
      p.move(thread, thread_next)
      following = tile(thread)
      current.decode(level, least)
      current.adopt(following)
  current.decode(level, least)
  return p
