"""Where a model's parameters live on a mesh, and those of what adapts them.

Every dataclass of weights names the axes of its fields (`mesh.axes`); here
"in" and "out" of each projection are bound to the logical axes of `mesh.RULES`.
A base, adapters, gradients and optimiser states are all placed by this.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding

from lora_jax import host as host_lib
from lora_jax import mesh as mesh_lib
from lora_jax import quant
from lora_jax import trees
from lora_jax import types

# (in, out) of each projection; (v, d) of the embedding.
LINEAR: dict[str, tuple[str, str]] = {
    "q_proj": ("model", "heads"),
    "k_proj": ("model", "heads"),
    "v_proj": ("model", "heads"),
    "o_proj": ("heads", "model"),
    "gate_proj": ("model", "mlp"),
    "up_proj": ("model", "mlp"),
    "down_proj": ("mlp", "model"),
    "lm_head": ("model", "vocab"),
    "embed_tokens": ("vocab", "model"),
}


def shardings(
    mesh: Mesh,
    tree: types.Tree,
    rules: Mapping = mesh_lib.RULES,
    target: str | None = None,
    axes: tuple[str | None, ...] = (),
) -> types.Tree:
  """Where every leaf lives.

  Args:
    mesh: the devices.
    tree: a base, adapters or optimiser states, or a part of one; anything
      with a shape may stand for a leaf.
    rules: the table.
    target: the projection that `tree` is a part of, if its path does not say.
    axes: of `tree`, if it is a leaf.

  Returns:
    A tree of `NamedSharding`; what names no axes is replicated.
  """
  names = dict(zip(("in", "out"), LINEAR.get(target or "", (None, None))))

  def walk(node, logical, names):
    if node is None:
      return None
    if jax.tree_util.all_leaves([node]):
      logical = [names.get(name, name) for name in logical]
      return NamedSharding(
          mesh, mesh_lib.spec(mesh, node.shape, logical, rules))
    fields = {}
    if dataclasses.is_dataclass(node):
      fields = {f.name: f.metadata.get("axes", ())
                for f in dataclasses.fields(node)}

    def child(path, value):
      name = trees.path_str(path)
      bound = names
      if name in LINEAR:
        bound = dict(zip(("in", "out"), LINEAR[name]))
      return walk(value, fields.get(name, ()), bound)

    # One level of `node`; its children, None among them, count as leaves.
    return jax.tree_util.tree_map_with_path(
        child, node, is_leaf=lambda x: x is not node)

  return walk(tree, axes, names)


def put(mesh: Mesh, tree: types.Tree) -> types.Tree:
  """A base, adapters or optimiser states on the mesh, leaf by leaf.

  What is in host memory goes to that of the hosts of its parts' devices.
  """
  return jax.tree.map(
      lambda x, sharding: mesh_lib.place(
          x, host_lib.home(sharding) if host_lib.in_host(x) else sharding),
      tree, shardings(mesh, tree))


def constrain(mesh: Mesh | None, tree: types.Tree) -> types.Tree:
  """Keeps a traced tree where `put` places it."""
  if mesh is None:
    return tree
  return jax.lax.with_sharding_constraint(tree, shardings(mesh, tree))


def rows(
    mesh: Mesh | None, x: jax.Array, *logical: str | None) -> jax.Array:
  """Keeps `x [b, ...]` cut along `b`, or as the axes' names say."""
  if mesh is None:
    return x
  logical = logical or ("batch",) + (None,) * (x.ndim - 1)
  return jax.lax.with_sharding_constraint(
      x, NamedSharding(mesh, mesh_lib.spec(mesh, x.shape, logical)))


def gathers(mesh: Mesh | None) -> bool:
  """Whether weights are gathered where they are used."""
  return mesh is not None and mesh.shape["fsdp"] > 1


def gathered(
    mesh: Mesh | None, tree: types.Tree, dtype: Any = None
) -> types.Tree:
  """A layer's weights or adapters, whole along fsdp, as they are used.

  Of a quantised weight it is the codes that are gathered. Left to itself XLA
  gathers what is computed from them, four times the bytes in bfloat16. Plain
  weights are gathered in the compute type. A gradient goes back to where its
  weight lives.

  Args:
    mesh: the devices, or None for one.
    tree: traced, of one layer (or of what is not stacked).
    dtype: compute type, of a base; None leaves every leaf in its own.

  Returns:
    The tree; cut along `tensor` only.
  """
  if not gathers(mesh):
    return tree
  assert mesh is not None

  def cast(leaf):
    plain = not isinstance(leaf, quant.QuantizedArray) and leaf.ndim >= 2
    return leaf.astype(dtype) if plain else leaf

  if dtype is not None:
    tree = jax.tree.map(
        cast, tree, is_leaf=lambda x: isinstance(x, quant.QuantizedArray))
  here = shardings(mesh, tree)
  there = shardings(mesh, tree, mesh_lib.GATHERED)

  def move(leaf, home, used):
    if home == used:
      return leaf
    if jnp.issubdtype(leaf.dtype, jnp.floating):
      return _moved(leaf, used, home)
    return jax.lax.with_sharding_constraint(leaf, used)

  return jax.tree.map(move, tree, here, there)


def housed(
    mesh: Mesh | None, layer: Mapping[str, Any],
    platforms: Collection[str] = ("tpu",)
) -> Mapping[str, Any]:
  """A layer whose quantised weights say how they are cut.

  TPUs' compiler cannot cut a kernel: each device runs it on its own part,
  where the parts are whole blocks.

  Args:
    mesh: the devices, or None for one.
    layer: of `gathered`.
    platforms: of the devices that need it.
  """
  if mesh is None or mesh.size == 1 or (
      mesh.devices.flat[0].platform not in platforms):
    return layer

  def house(target, weight):
    rows, columns = weight.shape
    number, tail = divmod(rows, min(weight.block_size, rows))
    specs = {
        mesh_lib.spec(mesh, (n, columns), LINEAR[target], mesh_lib.GATHERED)
        for n in (weight.codes.shape[0], number, rows)}
    if tail or len(specs) > 1:
      return weight
    return dataclasses.replace(weight, home=(mesh, specs.pop()))

  return {
      target: module.replace(weight=house(target, module.weight))
      if isinstance(getattr(module, "weight", None), quant.QuantizedArray)
      else module for target, module in layer.items()}


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _moved(x, used, home):
  """`x` at `used`; its cotangent at `home`, so that it is scattered."""
  del home
  return jax.lax.with_sharding_constraint(x, used)


def _moved_forward(x, used, home):
  return _moved(x, used, home), None


def _moved_backward(used, home, unused, g):
  del used, unused
  return (jax.lax.with_sharding_constraint(g, home),)


_moved.defvjp(_moved_forward, _moved_backward)
