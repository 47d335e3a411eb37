"""Few rows times a 4-bit weight on Hopper, without the weight in memory.

`matmul_warps` has the kernel; here are its plans, what it takes and its call.
"""

from __future__ import annotations

from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from lora_jax.kernels import decode as decode_lib
from lora_jax.kernels import matmul_warps
from lora_jax.kernels import thread as thread_lib

ROWS = 32  # Of `x`, at most.
# Blocks at once on an H100: two a multiprocessor, by their registers.
RESIDENT = 2 * 132
Plan = matmul_warps.Plan


def plan_for(rows: int, in_features: int, columns: int, terms: int) -> Plan:
  """A plan for `x [rows, in_features] @ w [in_features, columns]`.

  A block of 16 columns a lane has 16 KB of codes on their way, so that 128
  blocks have the 2 MB which arrive, at 3 TB/s, within a load's 700 ns. More
  splits shorten the chain of loads; more than `RESIDENT` blocks would leave
  some of them for a second, mostly empty wave.
  """
  # Beyond 16 rows 16 columns a lane need more registers than there are.
  width = 16 if rows <= 16 and columns >= 128 else 8
  chunks = in_features // (2 * matmul_warps.CHUNK)
  tiles = -(-columns // (8 * width))
  splits = 1
  # A warp asks for its first two chunks at once, and should have as many.
  least = 2 * matmul_warps.WARPS
  while (splits < 8 and 2 * splits * tiles <= RESIDENT
         and chunks >= 2 * splits * least):
    splits *= 2
  return Plan(width=width, splits=splits, terms=terms)


def applies(
    rows: int, in_features: int, columns: int, block_size: int, dtype: Any
) -> bool:
  """Whether the kernel takes `x [rows, in_features]` in `dtype`.

  Blocks must be whole, of 64 rows or a multiple; float32 would lose digits.
  """
  return (0 < rows <= ROWS and block_size % (2 * matmul_warps.CHUNK) == 0
          and in_features % block_size == 0 and columns >= 64
          and columns % 16 == 0 and in_features * columns < 2**32
          and dtype in (jnp.bfloat16, jnp.float16))


def body_for(
    rows: int, in_features: int, columns: int, block_size: int, dtype: Any,
    levels: decode_lib.Levels, minimums: bool, plan: Plan | None = None,
    nested: bool = False,
) -> matmul_warps.Body:
  """The kernel for `x [rows, in_features]` in `dtype`."""
  terms, unit = matmul_warps.levels_in_terms(levels, dtype)
  plan = plan or plan_for(rows, in_features, columns, len(terms))
  terms = terms[:1 if plan.decode == "prmt" else plan.terms]
  apart = plan.splits > 1 and not plan.cluster
  kind = matmul_warps.KINDS[jnp.dtype(dtype).name]
  return matmul_warps.Body(
      plan, rows, in_features, columns, block_size, kind,
      "f32" if apart else kind, terms, unit, minimums, nested)


def matmul(
    x: jax.Array,
    codes: jax.Array,
    *statistics: jax.Array,
    levels: decode_lib.Levels,
    block_size: int,
    plan: Plan | None = None,
) -> jax.Array:
  """`x @ w` in `x`'s dtype, summed in float32; see `applies` for what shapes.

  Args:
    x: `[l, m, i]` in bfloat16 or float16.
    codes: uint8 `[l, i / 2, o]`, two codes a byte.
    *statistics: float32 `[l, q, o]`: scales, and minimums if there are any.
      Or scales in 8 bits: uint8 `[l, q, o]`, float32 `[l, ceil(q o / 256)]`
      and `[l]` as in `double.Nested`, and the map, float32 `[256]`.
    levels: what a code stands for, before it is scaled.
    block_size: rows of a block.
    plan: how; `plan_for` by default.

  Returns:
    `[l, m, o]`. Levels are rounded to the sum of `plan.terms` numbers of `x`'s
    dtype; weights are not rounded.
  """
  layers, rows, in_features = x.shape
  columns = codes.shape[-1]
  body = body_for(rows, in_features, columns, block_size, x.dtype, levels,
                  len(statistics) == 2, plan, len(statistics) == 4)
  plan = body.plan
  apart = body.apart
  arrays, shared = body.arrays, list(body.shared)

  def matmul_kernel(*refs):
    indices = [lax.axis_index(name) for name in ("layer", "tile", "split")]

    @plgpu.inline_mgpu(arg_types=(
        *[plgpu.RefType()] * len(refs), *[plgpu.Layout.WG_SPLAT] * 3))
    def run(ctx, *args):
      del ctx
      # Apart: an array and its copy in shared memory may have one name.
      thread = thread_lib.Thread(
          dict(zip(arrays, args[:len(arrays)], strict=True)),
          dict(zip(shared, args[len(arrays):-3], strict=True)),
          {name: index.registers.item() for name, index in zip(
              ("layer", "tile", "split"), args[-3:], strict=True)})
      for who in body(thread):
        thread.wait(who)

    run(*refs, *indices)

  lead = (layers, plan.splits) if apart else (layers,)
  tiles = pl.cdiv(columns, body.span)
  mesh: dict[str, Any] = {"grid": (layers, tiles, plan.splits),
                          "grid_names": ("layer", "tile", "split")}
  if plan.cluster and plan.splits > 1:
    mesh = {"grid": (layers, tiles), "grid_names": ("layer", "tile"),
            "cluster": (plan.splits,), "cluster_names": ("split",)}
  out = plgpu.kernel(
      matmul_kernel,
      out_type=jax.ShapeDtypeStruct(
          (*lead, rows, columns), jnp.float32 if apart else x.dtype),
      scratch_types=[plgpu.SMEM((words,), jnp.int32)
                     for words in body.shared.values()],
      compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
      **mesh,
  )(x, codes, *statistics)
  return out.sum(1).astype(x.dtype) if apart else out
