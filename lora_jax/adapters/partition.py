"""Whole trees of adapters: what is trained of them, what a base tells them.

  Adapters({"q_proj": LoRA(a, b, scale, rate)})
  -> trainable Adapters({"q_proj": LoRA(a, b, None, None)})
  -> frozen    Adapters({"q_proj": LoRA(None, None, scale, rate)})
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import host as host_lib
from lora_jax import trees
from lora_jax import types
from lora_jax.adapters import base


def is_adapter(node: Any) -> bool:
  return isinstance(node, base.Adapter)


def with_rate(adapters: types.Tree, rate: float) -> types.Tree:
  """Adapters with another rate of dropout."""
  return jax.tree.map(
      lambda a: a.with_rate(rate) if is_adapter(a) else a, adapters,
      is_leaf=is_adapter)


def split(adapters: types.Tree) -> tuple[types.Tree, types.Tree]:
  """(trainable, frozen): partial trees that `trees.combine` joins again."""
  return _select(adapters, True), _select(adapters, False)


def _select(tree: types.Tree, trainable: bool) -> types.Tree:
  def pick(node):
    if not is_adapter(node):
      return node if trainable else None
    return node.selected(trainable)

  return jax.tree.map(pick, tree, is_leaf=is_adapter)


def join(trainable: types.Tree, frozen_part: types.Tree) -> types.Tree:
  """Inverse of `split`."""
  return trees.combine(trainable, frozen_part)


def rate_groups(params: types.Tree) -> types.Tree:
  """LoRA+'s group of every leaf of `params`, or None where it says nothing.

  {"outer": {"embed_tokens": LoRA(a, b)}} -> LoRA("embedding", "embedding")
  {"layers": {"q_proj": LoRA(a, b)}}      -> LoRA(None, "up")

  Args:
    params: the trainable part of an `Adapters`, or any tree.

  Returns:
    A partial tree with names of `RATE_GROUPS` for leaves.
  """

  def groups(path, node):
    if not is_adapter(node):
      return None
    return node.rate_groups(embedding=trees.path_str(path).endswith(
        "embed_tokens"))

  return jax.tree_util.tree_map_with_path(groups, params, is_leaf=is_adapter)


def module(
    adapters: base.Adapters, target: str, layer: int | types.Array | None
) -> base.Adapter | None:
  """The adapter of one place, unstacked and with what it shares, or None.

  Args:
    adapters: whole tree.
    target: a key of `layers` or `outer`.
    layer: which of the stack; None for what is outside of the layers.
  """
  where = adapters.outer if layer is None else adapters.layers
  found = where.get(target)
  if found is None:
    return None
  if layer is not None:
    found = jax.tree.map(lambda x: x[layer], found)
  return found.bound(adapters.shared)


def beside(adapters: base.Adapters, tree: types.Tree) -> base.Adapters:
  """Adapters that know the constants of the weights which they stand beside.

  Whoever makes adapters for a base, or changes the base below them, ends with
  this.

  Args:
    adapters: whole tree.
    tree: the base; see `prepared`.
  """

  def known(adapter, weight, stacked):
    if not adapter.constants:
      return adapter
    return adapter.with_constants(_constants(
        weight, functions=tuple(adapter.constants.items()), stacked=stacked))

  return dataclasses.replace(
      adapters,
      layers={name: known(adapter, _weight(tree, name, True), True)
              for name, adapter in adapters.layers.items()},
      outer={name: known(adapter, _weight(tree, name, False), False)
             for name, adapter in adapters.outer.items()})


def without_constants(adapter: base.Adapter) -> base.Adapter:
  """An adapter that asks its weight instead; see `beside`."""
  return adapter.with_constants(dict.fromkeys(adapter.constants))


@functools.partial(jax.jit, static_argnames=("functions", "stacked"))
def _constants(weight, *, functions, stacked):
  def one(w):
    w = host_lib.on_device(w)
    return {name: function(w) for name, function in functions}

  # One layer at a time: a dequantised stack would not fit beside the base.
  return jax.lax.map(one, weight) if stacked else one(weight)


def _weight(tree, name, stacked):
  """The base's weight at a place; None where it has none, or is no matrix."""
  holder = tree.layers.get(name) if stacked else getattr(tree, name, None)
  return getattr(holder, "weight", holder)


@functools.partial(jax.jit, static_argnames="dtype")
def prepared(
    adapters: base.Adapters, tree: types.Tree, dtype: Any = jnp.float32
) -> base.Adapters:
  """Adapters for decoding with frozen weights: see `Adapter.prepared`.

  Args:
    adapters: whole tree.
    tree: the base, whose `layers[target].weight` is stacked.
    dtype: of the activations that they will be applied to.

  Returns:
    A tree that computes the same.
  """
  shared = adapters.shared
  layers = {
      name: jax.lax.map(
          lambda pair: pair[0].folded(shared).prepared(
              host_lib.on_device(pair[1]), shared).narrowed(dtype),
          (adapter, _weight(tree, name, True)))
      for name, adapter in adapters.layers.items()}
  outer = {
      name: adapter.folded(shared).prepared(
          _weight(tree, name, False), shared)
      for name, adapter in adapters.outer.items()}
  return dataclasses.replace(adapters, layers=layers, outer=outer)


def trainable_size(adapters: types.Tree) -> int:
  """Trainable parameters of a whole tree; padding does not count."""
  return sum(
      node.size() if is_adapter(node) else trees.size(node)
      for node in jax.tree.leaves(adapters, is_leaf=is_adapter))


def virtual_tokens(adapters: base.Adapters | None) -> int:
  """Virtual tokens before every example."""
  if adapters is None or "prompt" not in adapters.outer:
    return 0
  return jax.eval_shape(
      lambda a, shared: a.bound(shared).virtual(), adapters.outer["prompt"],
      adapters.shared).shape[0] // virtual_tasks(adapters)


def virtual_tasks(adapters: base.Adapters | None) -> int:
  """Tasks whose virtual tokens differ."""
  if adapters is None or "prompt" not in adapters.outer:
    return 1
  return adapters.outer["prompt"].tasks
