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

import dataclasses
import math
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

from lora_jax import errors
from lora_jax.kernels import decode
from lora_jax.kernels import ptx
from lora_jax.kernels import ptx_levels

COLUMNS = 256  # The most that one copy spans.
WARPS = 4
LOOKUPS = ("select", "shuffle")


@dataclasses.dataclass(frozen=True)
class Variant:
  """How the work is done; every variant computes the same bits.

  Attributes:
    rows: byte rows of a warpgroup, at most: 4, 8, 16 or 32.
    lookup: one of `LOOKUPS`; the interpreter, which knows no shuffles, always
      selects.
  """

  rows: int = 32
  lookup: str = "select"


DEFAULT = Variant()

# [4, 128 n]: a warp has a row, a lane every 32nd group of 4 columns, which are
# 16 bytes of float32: the widest access.
LAYOUT = plgpu.Layout.TILED(
    plgpu.Tiling(((WARPS, 128), (4,))),
    warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


def _rows(byte_rows: int, half: int, most: int = DEFAULT.rows) -> int:
  """Byte rows of a warpgroup: all blocks, the tail too, are multiples."""
  return math.gcd(most, half, byte_rows % half)


def _shuffled(codes: jax.Array, levels: decode.Levels) -> jax.Array:
  """`decode.lookup` of the low 4 bits of codes laid out as `LAYOUT`: what
  lane `code` of the warp holds."""
  p = ptx.Program(0)
  table = ptx_levels.Select(p, levels).among(p.do("mov.u32", "%laneid"))
  p.code.append(ptx.Instruction("mov.b32", ("$0",), (table,)))

  @plgpu.inline_mgpu(
      arg_types=(LAYOUT,), return_type=plgpu.ShapeDtypeStruct(
          codes.shape, jnp.float32, LAYOUT))
  def run(_, codes):
    from jax.experimental.mosaic.gpu import fragmented_array
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith
    from jaxlib.mlir.dialects import llvm
    from jaxlib.mlir.dialects import vector

    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    table: Any = llvm.inline_asm(i32, [], p.text(), "=r")

    def found(register):
      (size,) = ir.VectorType(register.type).shape
      out: Any = llvm.mlir_undef(ir.VectorType.get((size,), i32))
      for k in range(size):
        code = vector.extract(register, [], [k])
        level: Any = llvm.inline_asm(
            i32, [table, code],
            f"shfl.sync.idx.b32 $0, $1, $2, {16 << 8 | 31}, {ptx.ALL};",
            "=r,r,r", has_side_effects=True)
        out = vector.insert(level, out, [], [k])
      return arith.bitcast(ir.VectorType.get((size,), f32), out)

    registers = np.empty_like(codes.registers)
    for index, register in np.ndenumerate(codes.registers):
      registers[index] = found(register)
    return fragmented_array.FragmentedArray(
        _registers=registers, _layout=codes.layout, _is_signed=None)

  return run(codes)


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
    variant: Variant = DEFAULT,
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
    variant: how the work is done.

  Returns:
    `levels[code] * scale (+ minimum)`; see `applies` for what shapes.
  """
  layers, byte_rows, columns = codes.shape
  half = block_size // 2
  whole, tail = divmod(byte_rows, half)  # Blocks, and byte rows after them.
  some = _rows(byte_rows, half, variant.rows)
  errors.choose("lookup", variant.lookup, dict.fromkeys(LOOKUPS))
  shuffle = variant.lookup == "shuffle" and not interpret

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
      low = packed if shuffle else packed & 15
      for k, nibbles in enumerate((low, packed >> 4)):
        out_buffer[k, pl.ds(r, WARPS)] = decode.decode(
            nibbles, scales, minimums, levels=levels, dtype=dtype,
            find=_shuffled if shuffle else decode.lookup)
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
