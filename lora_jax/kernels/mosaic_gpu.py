"""Dequantisation of 4-bit codes on Hopper: a Pallas kernel for Mosaic GPU.

A warpgroup takes up to 32 byte rows of one block by 256 columns. The copy
engine brings bytes and scales to shared memory and takes the two halves of
rows away; five such warpgroups share a multiprocessor, so that one's copies
hide behind another's arithmetic. Within it a warp has a row, and a lane twice 4
neighbouring columns: neighbouring lanes access neighbouring words of shared
memory, and a scale is read once for all rows.

Threads that access device memory directly, as wide and as coalesced, were
tried: the compiler loses the pointers' alignment where the row's pitch is a
power of two, and splits their accesses.
"""

from __future__ import annotations

import math
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from lora_jax.kernels import decode

COLUMNS = 256  # The most that one copy spans.
ROWS = 32  # Byte rows, at most.
WARPS = 4

# [4, 128 n]: a warp has a row, a lane every 32nd group of 4 columns, which are
# 16 bytes of float32: the widest access.
LAYOUT = plgpu.Layout.TILED(
    plgpu.Tiling(((WARPS, 128), (4,))),
    warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


def _rows(byte_rows: int, half: int) -> int:
  """Byte rows of a warpgroup: all blocks, the tail too, are multiples."""
  return math.gcd(ROWS, half, byte_rows % half)


def applies(
    rows: int, columns: int, block_size: int, dtype: jnp.dtype
) -> bool:
  """Whether the kernel takes a weight `[rows, columns]`.

  Rows of bytes must be aligned to 16 for the copy engine, and blocks, a tail
  too, consist of 8 rows, a byte row for each warp.
  """
  return (columns >= COLUMNS and columns % 16 == 0
          and _rows(rows // 2, block_size // 2) % WARPS == 0
          and dtype in (jnp.bfloat16, jnp.float16, jnp.float32))


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
    interpret: `plgpu.InterpretGPUParams()` to run without a GPU.

  Returns:
    `levels[code] * scale (+ minimum)`; see `applies` for what shapes.
  """
  layers, byte_rows, columns = codes.shape
  half = block_size // 2
  whole, tail = divmod(byte_rows, half)  # Blocks, and byte rows after them.
  some = _rows(byte_rows, half)

  def lay(values, layout):
    # The interpreter knows no layouts.
    return values if interpret else plgpu.layout_cast(values, layout)

  def dequantise_kernel(*refs):
    count = 1 + len(statistics)
    inputs, out, buffers = refs[:count], refs[count], refs[count + 1 : -2]
    out_buffer, barrier = refs[-2:]
    layer = lax.axis_index("layer")
    first = lax.axis_index("rows") * some
    # The last tile ends with the row, and repeats some of its neighbour.
    left = jnp.minimum(
        lax.axis_index("columns") * COLUMNS, columns - COLUMNS)
    across = pl.ds(left, COLUMNS)
    block = lax.div(first, half)

    plgpu.copy_gmem_to_smem(
        inputs[0].at[layer, pl.ds(first, some), across], buffers[0], barrier)
    for ref, buffer in zip(inputs[1:], buffers[1:], strict=True):
      plgpu.copy_gmem_to_smem(
          ref.at[layer, block, across], buffer, barrier)
    plgpu.barrier_wait(barrier)

    each = [lay(lax.broadcast_in_dim(lay(buffer[...], LAYOUT.reduce(0)),
                                     (WARPS, COLUMNS), (1,)), LAYOUT)
            for buffer in buffers[1:]]
    scales, minimums = (*each, None)[:2]
    for r in range(0, some, WARPS):
      packed = lay(buffers[0][pl.ds(r, WARPS)], LAYOUT).astype(jnp.int32)
      for k, nibbles in enumerate((packed & 15, packed >> 4)):
        out_buffer[k, pl.ds(r, WARPS)] = decode.decode(
            nibbles, scales, minimums, levels=levels, dtype=dtype)
    plgpu.commit_smem()

    low = first + block * half  # Row of the weight of the first low nibble.
    high = low + jnp.where(block < whole, half, tail)
    for k, row in enumerate((low, high)):
      plgpu.copy_smem_to_gmem(
          out_buffer.at[k], out.at[layer, pl.ds(row, some), across])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  return plgpu.kernel(
      dequantise_kernel,
      out_type=jax.ShapeDtypeStruct(
          (layers, 2 * byte_rows + below, columns), dtype),
      grid=(layers, byte_rows // some, pl.cdiv(columns, COLUMNS)),
      grid_names=("layer", "rows", "columns"),
      scratch_types=[
          plgpu.SMEM((some, COLUMNS), jnp.uint8),
          *[plgpu.SMEM((COLUMNS,), jnp.float32) for _ in statistics],
          plgpu.SMEM((2, some, COLUMNS), dtype),
          plgpu.Barrier(num_arrivals=1 + len(statistics)),
      ],
      # Safe here: threads only read the one buffers and only write the other,
      # and the barrier that publishes it is `commit_smem`'s.
      compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
      interpret=interpret,
  )(codes, *statistics)
