"""Few rows times a 4-bit weight on TPU, without the weight in HBM.

Tiles are those of `mosaic_tpu`, and so are the weights, rounded to `x`'s dtype:
each tile is decoded into VMEM and multiplied there, tile after tile along the
rows, into a float32 sum.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from lora_jax.kernels import decode
from lora_jax.kernels import mosaic_tpu

ROWS = 32  # Of `x`, at most.


def applies(
    rows: int, in_features: int, columns: int, block_size: int, dtype: Any
) -> bool:
  """Whether the kernel takes `x [rows, in_features]` in `dtype`."""
  # A tile's rows are columns of `x`, which come in registers of 128.
  whole = block_size * mosaic_tpu.BLOCKS % 128 == 0
  return (0 < rows <= ROWS and (whole or in_features <= block_size * 8)
          and mosaic_tpu.applies(in_features, columns, block_size, dtype))


def _kernel(
    x_ref: Any, *refs: Any, half: int, blocks: int, levels: decode.Levels
) -> None:
  codes_ref, *statistics_refs, out_ref, weight, total = refs
  step = pl.program_id(2)
  some = statistics_refs[0].shape[0]
  ragged = blocks % some != 0

  @pl.when(step == 0)
  def _():
    total[...] = jnp.zeros_like(total)

  codes = codes_ref[...].astype(jnp.int32)
  for n in range(some):
    packed = codes[n * half : (n + 1) * half]
    statistics = [ref[n : n + 1] for ref in statistics_refs]
    if ragged:  # What a tile is padded with may be NaN.
      statistics = [jnp.where(step * some + n < blocks, s, 0.0)
                    for s in statistics]
    scales, minimums = (*statistics, None)[:2]
    for k, nibbles in enumerate((packed & 15, packed >> 4)):
      first = (2 * n + k) * half
      weight[first : first + half] = decode.decode(
          nibbles, scales, minimums, levels=levels, dtype=weight.dtype)
  x = x_ref[...]
  if ragged:
    row = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    left = (blocks - step * some) * 2 * half
    x = jnp.where(row < left, x.astype(jnp.float32), 0.0).astype(x.dtype)
  total[...] += jnp.dot(x, weight[...], preferred_element_type=jnp.float32)

  @pl.when(step == pl.num_programs(2) - 1)
  def _():
    out_ref[...] = total[...].astype(out_ref.dtype)


def matmul(
    x: jax.Array,
    codes: jax.Array,
    *statistics: jax.Array,
    levels: decode.Levels,
    block_size: int,
    interpret: Any = False,
) -> jax.Array:
  """`x @ w` in `x`'s dtype, summed in float32; see `applies` for what shapes.

  Args:
    x: `[l, m, i]`.
    codes: uint8 `[l, i / 2, o]`, two codes a byte.
    *statistics: float32 `[l, q, o]`: scales, and minimums if there are any.
    levels: what a code stands for, before it is scaled.
    block_size: rows of a block.
    interpret: `True` or `pltpu.InterpretParams()` to run without a TPU.

  Returns:
    `[l, m, o]`.
  """
  layers, rows, in_features = x.shape
  columns = codes.shape[-1]
  half, blocks = block_size // 2, in_features // block_size
  some = min(mosaic_tpu.BLOCKS, blocks)
  width = mosaic_tpu.VALUES // (some * block_size) // 128 * 128
  width = min(width, -(-columns // 128) * 128, 2048)

  def tile(height):
    return pl.BlockSpec((None, height, width), lambda n, j, i: (n, i, j))

  return pl.pallas_call(
      functools.partial(_kernel, half=half, blocks=blocks, levels=levels),
      out_shape=jax.ShapeDtypeStruct((layers, rows, columns), x.dtype),
      grid=(layers, pl.cdiv(columns, width), pl.cdiv(blocks, some)),
      in_specs=[
          pl.BlockSpec((None, rows, some * block_size),
                       lambda n, j, i: (n, 0, i)),
          tile(some * half), *[tile(some) for _ in statistics]],
      out_specs=pl.BlockSpec((None, rows, width), lambda n, j, i: (n, 0, j)),
      scratch_shapes=[pltpu.VMEM((some * block_size, width), x.dtype),
                      pltpu.VMEM((rows, width), jnp.float32)],
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel", "parallel", "arbitrary")),
      interpret=interpret,
      name="matmul",
  )(x, codes, *statistics)
