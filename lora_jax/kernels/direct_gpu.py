"""Dequantisation of 4-bit codes on Hopper: threads at device memory.

A thread takes some byte rows of one block by 8 neighbouring columns: it asks
for all its bytes and scales at once, and stores 16 bytes, 8 values of a row,
at a time. A warp's accesses are 256 bytes of codes and 512 of weights in one
row. Nothing passes through shared memory and nobody waits for anyone, so that
as many loads are in flight as there are threads.

The level of a code is what lane `code` of the warp holds: one shuffle. The
product, the conversion of two values at once and a shift are the rest: 4.0
instructions a value in the machine code, all counted, where `mosaic_gpu` with
its tree of selects has 18.5.

Mosaic's own loads and stores lose the alignment of addresses; hence PTX, which
`ptx.interpret` runs where there is no GPU.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

from lora_jax.kernels import decode
from lora_jax.kernels import direct_program as program_lib
from lora_jax.kernels import ptx

Variant = program_lib.Variant
DEFAULT = Variant()


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
          and program_lib.byte_rows(variant, block_size // 2) > 1
          and jnp.dtype(dtype) in program_lib.CONVERSIONS)


def _launch(p: ptx.Program, blocks: int, warpgroups: int, out_type: Any):
  """The program as a kernel of its arrays."""

  def dequantise_direct(*refs):
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
    def run(_, *memrefs):
      # MLIR is imported where it is built: interpreting needs none.
      from jax.experimental.mosaic.gpu import utils
      from jaxlib.mlir import ir
      from jaxlib.mlir.dialects import llvm

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
    below: int = 0,
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
    below: rows that the result has more, which are not written.
    interpret: True to run without a GPU.
    table: float32 `[256]`, the values of 8-bit codes, if there are any.
    layer: int32 `[]`: the only one to read, straight out of the stack.
    variant: how the work is cut.

  Returns:
    `levels[code] * scale (+ minimum)`; one layer if `layer` is given. See
    `applies` for what shapes.
  """
  layers, byte_rows, columns = codes.shape
  shape = program_lib.Shape(
      layers if layer is None else 1, byte_rows, columns, block_size // 2,
      jnp.dtype(dtype), len(statistics) > 1, table is not None,
      layer is not None, below)
  arrays = [codes, *jax.tree.leaves(statistics)]
  if table is not None:
    arrays.append(table)
  if layer is not None:
    arrays.append(jnp.reshape(layer, 1).astype(jnp.int32))
  p = program_lib.program(shape, levels, variant)
  blocks, _ = shape.grid(variant)
  out_type = jax.ShapeDtypeStruct(
      (shape.layers, 2 * byte_rows + below, columns), shape.dtype)
  if not interpret:
    return _launch(p, blocks, variant.warpgroups, out_type)(*arrays)

  def run(*arrays):
    return ptx.interpret(
        p, [np.asarray(x) for x in arrays],
        np.full(out_type.shape, np.nan, out_type.dtype),
        ptx.grid(blocks, program_lib.WARPGROUP * variant.warpgroups))

  return jax.pure_callback(run, out_type, *arrays)
