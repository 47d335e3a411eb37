"""Dequantisation of 4-bit codes on TPU: a Pallas kernel for Mosaic.

A tile is some whole blocks by some columns. Bytes are widened to int32, in
which a block's bytes fill whole vector registers (8 rows), and each half of a
block is decoded under the block's one row of scales. Ragged edges are Pallas'
business: what it pads an input with decodes to something, which is cut off the
output.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from lora_jax.kernels import decode

# Rows of scales in a tile: one register of float32 is 8 rows of 128.
BLOCKS = 8
# Of a tile in VMEM. With the two buffers of each of codes, scales and output
# and the int32 and float32 between them, about 6 MiB of the 16.
VALUES = 2**18


def applies(
    rows: int, columns: int, block_size: int, dtype: jnp.dtype
) -> bool:
  """Whether the kernel takes a weight `[rows, columns]`.

  Blocks must be whole (a tail has other halves than a block) and fill
  registers: 16 rows of 16 bits, 8 of the bytes as int32. Mosaic has no
  float16.
  """
  return (block_size % 16 == 0 and rows % block_size == 0
          and block_size * BLOCKS * 128 <= VALUES and columns >= 128
          and dtype in (jnp.bfloat16, jnp.float32))


def _kernel(
    *refs: Any, half: int, levels: decode.Levels
) -> None:
  codes_ref, *statistics_refs, out_ref = refs
  codes = codes_ref[...].astype(jnp.int32)
  for n in range(codes.shape[0] // half):
    packed = codes[n * half : (n + 1) * half]
    statistics = [ref[n : n + 1] for ref in statistics_refs]
    scales, minimums = (*statistics, None)[:2]
    for k, nibbles in enumerate((packed & 15, packed >> 4)):
      first = (2 * n + k) * half
      out_ref[first : first + half] = decode.decode(
          nibbles, scales, minimums, levels=levels, dtype=out_ref.dtype)


def dequantise(
    codes: jax.Array,
    *statistics: jax.Array,
    levels: decode.Levels,
    block_size: int,
    dtype: Any,
    below: int = 0,
    interpret: Any = False,
) -> jax.Array:
  """The weights `[l, i, o]` in `dtype`.

  Args:
    codes: uint8 `[l, i / 2, o]`, two codes a byte.
    *statistics: float32 `[l, q, o]`: scales, and minimums if there are any.
    levels: what a code stands for, before it is scaled.
    block_size: rows of a block.
    dtype: of the result.
    below: rows that the result has more, which are not written.
    interpret: `True` or `pltpu.InterpretParams()` to run without a TPU.

  Returns:
    `levels[code] * scale (+ minimum)`; see `applies` for what shapes.
  """
  layers, byte_rows, columns = codes.shape
  half = block_size // 2
  blocks = byte_rows // half
  some = min(BLOCKS, blocks)
  width = VALUES // (some * block_size) // 128 * 128
  width = min(width, -(-columns // 128) * 128, 2048)
  grid = (layers, pl.cdiv(blocks, some), pl.cdiv(columns, width))

  def tile(rows):
    return pl.BlockSpec((None, rows, width), lambda n, i, j: (n, i, j))

  return pl.pallas_call(
      functools.partial(_kernel, half=half, levels=levels),
      out_shape=jax.ShapeDtypeStruct(
          (layers, blocks * block_size + below, columns), dtype),
      grid=grid,
      in_specs=[tile(some * half), *[tile(some) for _ in statistics]],
      out_specs=tile(some * block_size),
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel",) * 3),
      interpret=interpret,
      name="dequantise",
  )(codes, *statistics)
