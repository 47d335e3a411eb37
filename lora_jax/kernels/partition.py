"""A kernel in a program for many devices.

XLA cannot look into a kernel and would gather its operands onto every device.
`partitioned` tells it what may be cut, without a mesh in any signature:
leading axes, columns, and rows wherever a shard is whole blocks. What may not
is gathered as codes, not as weights.

That takes a callback that the compiler for TPU does not have ("Custom emitter
for CustomSPMDPartitioning not found"). `local` is what remains there: the
kernel if the program has one device or stands in a `shard_map`, else what XLA
can cut by itself.
"""

from __future__ import annotations

from collections.abc import Callable
import math
from typing import Any

import jax
from jax.experimental import custom_partitioning as cp
from jax.extend import core
from jax.interpreters import mlir
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec


def rule(
    shape: tuple[int, ...], statistics: int, block_size: int,
    below: bool = False
) -> cp.SdyShardingRule:
  """How Shardy's propagation reads the kernel.

  Rows are blocks times rows of a block, and only the blocks are one axis in
  bytes, statistics and weight. With a tail, or rows below the last block,
  there is no such axis.

  Args:
    shape: of the codes, `[..., i / 2, o]`.
    statistics: how many arrays `[..., q, o]` there are.
    block_size: rows of a block.
    below: whether a last operand `[..., n, o]` is put below the weight.
  """
  half = block_size // 2
  lead = tuple(f"l{n}" for n in range(len(shape) - 2))
  byte: Any = "b"
  row: Any = "i"
  if below:
    options: dict[str, Any] = {
        "need_replication_factors": ("b", "q", "n", "i")}
  elif shape[-2] % half:
    options = {"need_replication_factors": ("b", "q", "i")}
  else:
    byte, row = cp.CompoundFactor("q", "b"), cp.CompoundFactor("q", "i")
    options = {"b": half, "i": block_size,
               "need_replication_factors": ("b", "i")}
  return cp.SdyShardingRule(
      (cp.ArrayMapping(*lead, byte, "o"),
       *[cp.ArrayMapping(*lead, "q", "o")] * statistics,
       *[cp.ArrayMapping(*lead, "n", "o")] * below),
      (cp.ArrayMapping(*lead, row, "o"),), **options)


def _names(*axes: Any) -> set[str]:
  return {name for axis in axes
          for name in (axis if isinstance(axis, tuple) else (axis,))} - {None}


def _shards(mesh: jax.sharding.Mesh, axis: Any) -> int:
  names = axis if isinstance(axis, tuple) else (axis,)
  return math.prod(mesh.shape[name] for name in names if name is not None)


def allowed(
    mesh: jax.sharding.Mesh,
    spec: PartitionSpec,
    shape: tuple[int, ...],
    block_size: int,
    below: bool = False,
) -> PartitionSpec:
  """`spec` of a weight of `shape`, less the cuts that a kernel cannot take.

  `P("fsdp", "tensor")` of a weight of 9 blocks on `fsdp=4, tensor=2` ->
  `P(None, "tensor")`.
  """
  axes = [*spec, *[None] * (len(shape) - len(spec))]
  units = list(shape)
  whole = shape[-2] % block_size == 0 and not below
  units[-2] = shape[-2] // block_size if whole else 1
  return PartitionSpec(*[
      axis if unit % _shards(mesh, axis) == 0 else None
      for axis, unit in zip(axes, units, strict=True)])


def partitioned(
    run: Callable[..., jax.Array], block_size: int, below: bool = False
) -> Callable[..., jax.Array]:
  """`run(codes [..., i / 2, o], *statistics [..., q, o])`, cut like its result.

  Args:
    run: what computes the weight `[..., i, o]` of a whole or a local shard.
    block_size: rows of a block.
    below: whether there is a last operand `[..., n, o]`, more rows of it.

  Returns:
    The same function of global arrays.
  """

  def partition(mesh, arg_shapes, result_shape):
    spec = allowed(
        mesh, result_shape.sharding.spec, result_shape.shape, block_size,
        below)
    cut = NamedSharding(mesh, spec)
    return mesh, run, cut, (cut,) * len(arg_shapes)

  def sharding_rule(mesh, operands, results):
    del mesh, results
    statistics = len(operands) - 1 - below
    return rule(tuple(operands[0].shape), statistics, block_size, below)

  def whole(*args):
    return run(*args)

  cut = cp.custom_partitioning(whole)
  cut.def_partition(partition=partition, sharding_rule=sharding_rule)
  return cut


def product(
    run: Callable[..., jax.Array], block_size: int
) -> Callable[..., jax.Array]:
  """`run(x [..., m, i], codes [..., i / 2, o], *statistics [..., q, o])`, cut
  like the codes.

  Where they are cut along `i`, the shards' products are added in float32; few
  rows of `x` travel rather than the weight.

  Args:
    run: what computes `x @ w` `[..., m, o]` of a whole or a local shard.
    block_size: rows of a block.

  Returns:
    The same function of global arrays.
  """

  def partition(mesh, arg_shapes, result_shape):
    del result_shape
    x, codes, *statistics = arg_shapes
    shape = (*codes.shape[:-2], 2 * codes.shape[-2], codes.shape[-1])
    spec = allowed(mesh, codes.sharding.spec, shape, block_size)
    *lead, along, columns = spec
    axes = [*x.sharding.spec, *[None] * (len(shape) - len(x.sharding.spec))]
    rows = axes[-2] if not _names(axes[-2]) & _names(*spec) else None

    def place(*axes):
      return NamedSharding(mesh, PartitionSpec(*lead, *axes))

    def shard(*args):
      y = run(*args)
      if along is None:
        return y
      names = along if isinstance(along, tuple) else (along,)
      return jax.lax.psum(y.astype(jnp.float32), names).astype(y.dtype)

    return mesh, shard, place(rows, columns), (
        place(rows, along), *[place(along, columns)] * (1 + len(statistics)))

  def sharding_rule(mesh, operands, results):
    del mesh, results
    of_weight = rule(tuple(operands[1].shape), len(operands) - 2, block_size)
    *lead, row, _ = of_weight.result_mappings[0]
    whole = "q" in of_weight.need_replication_factors
    names = {n for mapping in (
        *of_weight.operand_mappings, cp.ArrayMapping(*lead, row))
             for axis in mapping for n in (
                 axis if isinstance(axis, tuple) else (axis,))}
    options: dict[str, Any] = {
        n: size for n, size in of_weight.factor_sizes.items() if n in names}
    return cp.SdyShardingRule(
        (cp.ArrayMapping(*lead, "m", row), *of_weight.operand_mappings),
        (cp.ArrayMapping(*lead, "m", "o"),),
        reduction_factors=() if whole else ("q",),
        # In the order of their first use.
        need_replication_factors=("i", "b", "q") if whole else ("i", "b"),
        **options)

  def whole(*args):
    return run(*args)

  cut = cp.custom_partitioning(whole)
  cut.def_partition(partition=partition, sharding_rule=sharding_rule)
  return cut


_local_p = core.Primitive("local_kernel")


@_local_p.def_abstract_eval
def _(*avals, run, other):
  del run
  out = jax.eval_shape(other, *avals)
  return jax.core.ShapedArray(out.shape, out.dtype)


def _lower(ctx, *args, run, other):
  context = ctx.module_context.axis_context
  if hasattr(context, "manual_axes"):
    alone = set(context.manual_axes) == set(context.mesh.axis_names)
  else:
    alone = context.num_devices == 1
  chosen = run if alone else other
  return mlir.lower_fun(chosen, multiple_results=False)(ctx, *args)


mlir.register_lowering(_local_p, _lower)


def local(
    run: Callable[..., jax.Array], other: Callable[..., jax.Array]
) -> Callable[..., jax.Array]:
  """`run` where it sees all there is, `other` where XLA is to cut it.

  Args:
    run: a kernel.
    other: the same in operations that XLA can partition.

  Returns:
    A function for use inside jit.
  """

  def chosen(*args):
    return _local_p.bind(*args, run=run, other=other)

  return chosen
