"""What a start takes out of the base, put in its place weight by weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import functools
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import errors
from lora_jax import host as host_lib
from lora_jax import mesh as mesh_lib
from lora_jax import quant
from lora_jax import types
from lora_jax.adapters import runs
from lora_jax.adapters.starts import decomposed
from lora_jax.adapters.starts import table

# `(target, layer or None) -> [i, o] float32`: weights before quantisation.
Originals = Callable[[str, int | None], types.Array]
# Stacked A0 and B0 by target.
Factors = Mapping[str, tuple[types.Array, types.Array]]


def replace(
    start: table.Start,
    tree: types.Tree,
    placements: Mapping[str, Any],
    originals: Originals | None,
    donate: bool = False,
    given: Factors | None = None,
) -> tuple[types.Tree, dict[str, tuple[jax.Array, jax.Array]]]:
  """Takes A and B out of every adapted weight, one at a time.

  Args:
    start: one that replaces.
    tree: the base.
    placements: `rank` and `scale` `[l]` by target.
    originals: weights before quantisation; of unquantised targets the base's
      own are taken.
    donate: whether the base's weights are given up and written over, so that
      memory holds the base and two matrices.
    given: what to take out, where that is known; else `start` finds it.

  Returns:
    The base with its weights replaced, and the stacked (A, B) by target.

  Raises:
    errors.UsageError: for loftq where nothing is quantised, without
      `originals` where something is, or for weights in host memory.
  """
  found = {}
  for name, placement in placements.items():
    if name == "embed_tokens":
      continue
    stacked = name in tree.layers
    linear = tree.layers[name] if stacked else tree.lm_head
    weight = linear.weight
    _check(start, name, weight)
    if not stacked:
      weight = jax.tree.map(lambda x: x[None], weight)
    elif not donate:
      weight = jax.tree.map(jnp.copy, weight)
    weight, found[name] = _replace_stack(
        start, name, weight, placement, originals, stacked,
        given and given[name])
    if stacked:
      linear = linear.replace(weight=weight)
      tree = tree.replace(layers=tree.layers | {name: linear})
    else:
      weight = jax.tree.map(lambda x: x[0], weight)
      tree = tree.replace(lm_head=linear.replace(weight=weight))
  return tree, found


def attached(
    adapters: types.Tree,
    factors: Factors) -> types.Tree:
  """Adapters with the A0 and B0 that `replace` found, where it found some."""

  def stacked(name, adapter):
    if name not in factors:
      return adapter
    a, b = factors[name]

    def attach(stack, start, stop):
      width = stack.a.shape[-1]
      return stack.replace(a0=a[start:stop, :, :width],
                           b0=b[start:stop, :width])

    return runs.mapped(attach, adapter)

  def outer(name, adapter):
    if name not in factors:
      return adapter
    a, b = factors[name]
    return adapter.replace(a0=a[0], b0=b[0])

  return adapters.replace(
      layers={k: stacked(k, v) for k, v in adapters.layers.items()},
      outer={k: outer(k, v) for k, v in adapters.outer.items()})


def taken(
    adapters: types.Tree) -> dict[str, tuple[types.Array, types.Array]]:
  """The A0 and B0 in adapters, as `replace` found them; see `attached`."""
  found = {name: (one.a0, one.b0) for name, one in adapters.outer.items()
           if getattr(one, "a0", None) is not None}
  for name, one in adapters.layers.items():
    parts = [(stack.a0, stack.b0, start, stop)
             for stack, start, stop in runs.each(one)
             if getattr(stack, "a0", None) is not None]
    if not parts:
      continue
    if not isinstance(one, runs.Runs):
      found[name] = parts[0][:2]
      continue
    width = max(a.shape[-1] for a, *_ in parts)
    whole_a = np.zeros((one.ends[-1], parts[0][0].shape[1], width), np.float32)
    whole_b = np.zeros((one.ends[-1], width, parts[0][1].shape[2]), np.float32)
    for a, b, start, stop in parts:
      whole_a[start:stop, :, :a.shape[-1]] = mesh_lib.fetch(a)
      whole_b[start:stop, :b.shape[1]] = mesh_lib.fetch(b)
    found[name] = whole_a, whole_b
  return found


def original(
    name: str, weight: types.Tree, layer: int, originals: Originals | None,
    stacked: bool
) -> jax.Array:
  """A weight `[i, o]` float32 as it was before quantisation.

  Args:
    name: the target.
    weight: the base's stack.
    layer: which of it.
    originals: see `replace`.
    stacked: whether the target is in the layers.

  Raises:
    errors.UsageError: if it is quantised and `originals` are not at hand.
  """
  if not isinstance(weight, quant.QuantizedArray):
    return weight[layer].astype(jnp.float32)
  if originals is None:
    raise errors.UsageError(
        f'adapter.init: the base holds "{name}" quantised, and its original '
        "weights are not at hand; load the model from its source")
  return originals(name, layer if stacked else None)


def _replace_stack(
    start, name, weight, placement, originals, stacked, given):
  depth = len(placement.rank)
  i, o = weight.shape[-2:]
  width = int(max(placement.rank))
  factors = []
  for layer in range(depth):
    if not placement.rank[layer]:
      factors.append((jnp.zeros((i, width), jnp.float32),
                      jnp.zeros((width, o), jnp.float32)))
      continue
    before = None
    if isinstance(weight, quant.QuantizedArray):
      before = original(name, weight, layer, originals, stacked)
    known = given and tuple(mesh_lib.fetch(x[layer]) for x in given)
    new, *pair = _decompose(
        before, weight, layer, placement.rank[layer],
        placement.scale[layer], known, start=start, width=width)
    # Waiting keeps the next original from being read while this one is held.
    weight = jax.block_until_ready(_put(weight, new, layer))
    factors.append(tuple(pair))
  a, b = (jnp.stack(x) for x in zip(*factors, strict=True))
  return weight, (a, b)


@functools.partial(jax.jit, static_argnames=("start", "width"))
def _decompose(before, stack, layer, rank, scale, given, *, start, width):
  like = jax.tree.map(
      lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), stack)
  w = (like if before is None else before).astype(jnp.float32)
  if given is not None:
    a, b = given
    return decomposed.left(w, a, b, scale, like), a, b
  return start.decompose(w, like, width, rank, scale, **dict(start.options))


@functools.partial(jax.jit, donate_argnums=0)
def _put(stack, one, layer):
  return jax.tree.map(
      lambda whole, x: jax.lax.dynamic_update_index_in_dim(
          whole, x, layer, 0), stack, one)


def _check(start, name, weight):
  quantised = isinstance(weight, quant.QuantizedArray)
  if any(map(host_lib.in_host, jax.tree.leaves(weight))):
    raise errors.UsageError(
        f'adapter.init replaces the weights of "{name}", which '
        "compute.offload=base keeps in host memory; leave base out of it, or "
        "use adapter.init=default")
  if start.decompose is decomposed.loftq and not quantised:
    raise errors.UsageError(
        f'adapter.init="loftq": "{name}" is not quantised; set quant.format, '
        "or take it out of adapter.targets, or use pissa")


def digest(tree: types.Tree, factors: Factors) -> str:
  """sha256 hex of the replaced weights and the (A, B) taken out of them."""
  found = hashlib.sha256()
  for name in sorted(factors):
    linear = tree.layers.get(name, tree.lm_head)
    for leaf in jax.tree.leaves((linear.weight, factors[name])):
      # A layer at a time: the host need not hold a whole stack.
      for part in leaf if leaf.ndim > 2 else (leaf,):
        array = np.ascontiguousarray(mesh_lib.fetch(part))
        found.update(f"{name} {array.dtype} {array.shape}".encode())
        found.update(array.reshape(-1).view(np.uint8).data)
  return found.hexdigest()
