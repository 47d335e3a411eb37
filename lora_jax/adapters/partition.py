"""Whole trees of adapters: what is trained of them, what a base tells them.

  Adapters({"q_proj": LoRA(a, b, scale, rate)})
  -> trainable Adapters({"q_proj": LoRA(a, b, None, None)})
  -> frozen    Adapters({"q_proj": LoRA(None, None, scale, rate)})
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import host as host_lib
from lora_jax import trees
from lora_jax import types
from lora_jax.adapters import base
from lora_jax.adapters import runs


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
    layer: its number, traced only where all layers are one stack; None for
      what is outside of them.
  """
  where = adapters.outer if layer is None else adapters.layers
  found = where.get(target)
  if found is not None and layer is not None:
    found, row = runs.at(found, layer)
    found = jax.tree.map(lambda x: x[row], found)
  return None if found is None else found.bound(adapters.shared)


def is_guided(adapters: base.Adapters) -> bool:
  """Whether some of them are yet to be bound to a first pass; see `guided`."""
  return adapters.shared is not None and any(
      stack.guided for stacked in adapters.layers.values()
      for stack, *_ in runs.each(stacked))


def unguided(adapters: base.Adapters) -> base.Adapters:
  """What a first pass has of adapters: none in the layers, no gradient."""
  return jax.lax.stop_gradient(
      dataclasses.replace(adapters, layers={}, shared=None))


def guided(
    adapters: base.Adapters, hidden: types.Array, noise: Any = None
) -> base.Adapters:
  """The adapters of a second pass, with all that they need to be told.

  They are bound before the layers are gone through: what they are bound to
  can be large, and each layer is only given its own.

  Args:
    adapters: whole tree, of which some are `guided`.
    hidden: `[b, t, d]` of the first pass; see `Adapter.guide`.
    noise: of a training step, or None.
  """
  found = adapters.shared.guide(jax.lax.stop_gradient(hidden), noise)

  def bind(stack, start, stop):
    del start, stop
    return jax.vmap(lambda one: one.bound(found))(stack)

  return dataclasses.replace(adapters, shared=None, layers={
      name: runs.mapped(bind, stacked)
      for name, stacked in adapters.layers.items()})


def reader(adapters: base.Adapters) -> Any:
  """The decoder that reads the input first, if that is what they share."""
  found = adapters.shared
  return found if is_adapter(found) and found.reads_first else None


def by_token(adapters: Mapping[str, base.Adapter]) -> dict[str, Any]:
  """What a layer's adapters know of each token, by target."""
  found = {name: one.by_token() for name, one in adapters.items()}
  return {name: known for name, known in found.items() if known is not None}


def of_tokens(
    adapters: Mapping[str, base.Adapter], known: Mapping[str, Any]
) -> dict[str, base.Adapter]:
  """A layer's adapters for those tokens of which `by_token` was cut."""
  return {**adapters, **{
      name: adapters[name].of_tokens(value) for name, value in known.items()}}


def beside(
    adapters: base.Adapters, tree: types.Tree, order: Sequence[int] = ()
) -> base.Adapters:
  """Adapters that know the constants of the weights which they stand beside.

  Whoever makes adapters for a base, or changes the base below them, ends with
  this.

  Args:
    adapters: whole tree.
    tree: the base; see `prepared`.
    order: see `prepared`.
  """

  def known(adapter, weight, layers=None):
    if not adapter.constants:
      return adapter
    return adapter.with_constants(_constants(
        weight, layers, adapter.part(adapters.shared),
        functions=tuple(adapter.constants.items())))

  def stacked(name, adapter):
    return runs.mapped(
        lambda stack, start, stop: known(
            stack, _known(tree, name, True, stack),
            runs.order_of(order, start, stop)), adapter)

  return dataclasses.replace(
      adapters,
      layers={name: stacked(name, adapter)
              for name, adapter in adapters.layers.items()},
      outer={name: known(adapter, _known(tree, name, False, adapter))
             for name, adapter in adapters.outer.items()})


def without_constants(adapter: base.Adapter) -> base.Adapter:
  """An adapter that asks its weight instead; see `beside`."""
  return adapter.with_constants(dict.fromkeys(adapter.constants))


@functools.partial(jax.jit, static_argnames="functions")
def _constants(weight, layers, shared, *, functions):
  def one(w):
    w = host_lib.on_device(w)
    return {name: function(w, shared) for name, function in functions}

  if layers is None:
    return one(weight)
  # One layer at a time: a dequantised stack would not fit beside the base.
  return jax.lax.map(lambda layer: one(runs.layer(weight, layer)), layers)


def _known(tree, name, stacked, adapter):
  """What an adapter's constants are told of the base at a place."""
  if not adapter.of_bias:
    return _weight(tree, name, stacked)
  return tree.layers.get(name) if stacked else getattr(tree, name, None)


def _weight(tree, name, stacked):
  """The base's weight at a place; None where it has none, or is no matrix."""
  holder = tree.layers.get(name) if stacked else getattr(tree, name, None)
  return getattr(holder, "weight", holder)


@functools.partial(jax.jit, static_argnames=("dtype", "order"))
def prepared(
    adapters: base.Adapters, tree: types.Tree, dtype: Any = jnp.float32,
    order: tuple[int, ...] = ()
) -> base.Adapters:
  """Adapters for decoding with frozen weights: see `Adapter.prepared`.

  Args:
    adapters: whole tree.
    tree: the base, whose `layers[target].weight` is stacked.
    dtype: of the activations that they will be applied to.
    order: which of the stack is each layer's, if it is not its own number;
      see `depth.order`.

  Returns:
    A tree that computes the same.
  """
  shared = adapters.shared

  def stacked(name, adapter):
    weight = _weight(tree, name, True)

    def one(pair):
      own, layer = pair
      found = None if weight is None else runs.layer(weight, layer)
      return own.folded(shared).prepared(found, shared).narrowed(dtype)

    return runs.mapped(
        lambda stack, start, stop: jax.lax.map(
            one, (stack, runs.order_of(order, start, stop))), adapter)

  layers = {name: stacked(name, adapter)
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


def virtual_places(
    adapters: base.Adapters | None, trains: bool = False) -> dict[str, Any]:
  """What `data.virtual.ahead` is told of the virtual tokens.

  Args:
    adapters: whole tree, or None.
    trains: whether what an adapter has to predict of them counts.
  """
  found: dict[str, Any] = {
      "n": virtual_tokens(adapters), "tasks": virtual_tasks(adapters)}
  if adapters is not None and trains and found["n"]:
    found["labels"] = jax.device_get(
        adapters.outer["prompt"].bound(adapters.shared).labels())
  return found
