"""Trees of parameters: partial trees, paths, counts.

A *partial* tree has the structure of a full one with `None` where a leaf is
missing. Frozen and trainable parameters are two partial trees of one whole:

  adapters = {"q_proj": LoRA(a=A, b=B, scale=s)}
  trainable = {"q_proj": LoRA(a=A, b=B, scale=None)}
  frozen = {"q_proj": LoRA(a=None, b=None, scale=s)}
  combine(trainable, frozen) == adapters
"""

from __future__ import annotations

import math

import jax

from lora_jax import types


def combine(first: types.Tree, second: types.Tree) -> types.Tree:
  """Leaves of `first`, and those of `second` where `first` holds `None`.

  Either tree may hold `None` in place of a whole subtree.
  """
  if first is None:
    return second
  if second is None:
    return first
  if jax.tree_util.all_leaves([first]):
    return first
  # One level of `first`; its children, None among them, count as leaves.
  return jax.tree.map(
      combine, first, second, is_leaf=lambda node: node is not first)


def without(tree: types.Tree, taken: types.Tree) -> types.Tree:
  """`tree` with `None` in place of what the partial tree `taken` holds."""
  if taken is None:
    return tree
  if jax.tree_util.all_leaves([taken]):
    return None
  return jax.tree.map(
      lambda own, whole: without(whole, own), taken, tree,
      is_leaf=lambda node: node is not taken)


def path_str(path: tuple) -> str:
  """`layers.q_proj.a` for a key path of `jax.tree_util`."""
  return jax.tree_util.keystr(path, simple=True, separator=".")


def paths(tree: types.Tree) -> dict[str, types.Array]:
  """Leaves by dotted path, in the tree's order."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {path_str(path): leaf for path, leaf in leaves}


def stacked(tree: types.Tree) -> types.Tree:
  """A bool for every leaf: whether it carries the scanned layers' `l` axis."""

  def one(path, leaf):
    del leaf
    return any(getattr(k, "name", getattr(k, "key", None)) == "layers"
               for k in path)

  return jax.tree_util.tree_map_with_path(one, tree)


def size(tree: types.Tree) -> int:
  """Number of elements in all leaves."""
  return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def nbytes(tree: types.Tree) -> int:
  """Bytes held by all leaves."""
  return sum(
      math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
