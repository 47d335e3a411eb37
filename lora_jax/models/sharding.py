"""Logical axes of a model's parameters, and of the adapters beside them."""

from __future__ import annotations

import jax
from jax.sharding import Mesh
from jax.sharding import NamedSharding

from lora_jax import mesh as mesh_lib
from lora_jax import trees
from lora_jax import types

# (in, out) of each projection.
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


def _logical(path: str, ndim: int) -> tuple[str | None, ...]:
  """Names of the last axes of the leaf at a dotted path."""
  target = next((t for t in LINEAR if f".{t}." in f".{path}."), None)
  leaf = path.rpartition(".")[2]
  if target is None or ndim == 0:
    return ()
  into, out = LINEAR[target]
  if leaf == "a":
    return (into, None)
  if leaf == "b":
    return (None, out)
  if leaf in ("bias", "m"):
    return (out,)
  # Weights, codes [i/2, o] and block statistics [q, o]: cut alike. What is
  # nested below the statistics' own codes is small, and replicated.
  if leaf in ("weight", "codes", "scales", "minima", "embed_tokens"):
    return (into, out)
  return ()


def named(mesh: Mesh, path: str, shape: tuple[int, ...]) -> NamedSharding:
  """Where the leaf of `shape` at a dotted path of a tree lives."""
  logical = _logical(path, len(shape))
  logical = logical if len(logical) <= len(shape) else ()
  return NamedSharding(mesh, mesh_lib.spec(mesh, shape, logical))


def put(mesh: Mesh, tree: types.Tree) -> types.Tree:
  """A base, adapters or optimiser states on the mesh, leaf by leaf."""

  return jax.tree_util.tree_map_with_path(
      lambda path, leaf: jax.device_put(
          leaf, named(mesh, trees.path_str(path), leaf.shape)), tree)
