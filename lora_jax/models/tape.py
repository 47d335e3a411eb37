"""A scan over layers that keeps what `remat` calls `named`, once.

`lax.scan` under `jax.checkpoint` stacks what a policy keeps after the layer
has made it: a copy to the stack, and one back. Of a 7B model's step on an H100
(4 x 2048 tokens) that is 20 GB each way, a tenth of the time. XLA can have a
product or a kernel write its slice of the stack, but does so by computing what
others read as well once more, for them.

So whoever makes such a value puts it into the stack and goes on with what it
reads there: `keep(name, value)`. Forwards that is a `Record`. Backwards the
layer is computed again with a `Replay`, where `keep` gives the value of the
stack and hands the cotangent on to what made it, whose computation nothing
reads any more. The layer's own input is kept in the same way.

These are three of `keep.Keep`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from lora_jax import keep as keep_lib
from lora_jax import trees
from lora_jax import types
from lora_jax.models import remat

T = TypeVar("T", bound=types.Tree)
# `(shared, carry, xs, keep) -> (carry, ys)`, all traced values among its
# arguments.
Body = Callable[[types.Tree, types.Tree, types.Tree, keep_lib.Keep],
                tuple[types.Tree, types.Tree]]


class Shapes:
  """A `Keep` that only looks."""

  def __init__(self) -> None:
    self.found: list[jax.ShapeDtypeStruct] = []

  def __call__(self, name: str, value: T) -> T:
    if name in remat.NAMES:
      self.found += [jax.ShapeDtypeStruct(x.shape, x.dtype)
                     for x in jax.tree.leaves(value)]
    return value


class Record:
  """A `Keep` that writes the values of layer `number` into stacks.

  Attributes:
    stacks: `[l, ...]`, in the order of the calls; as far as they were made,
      with the values.
  """

  def __init__(self, stacks: Sequence[jax.Array], number: jax.Array):
    self.stacks, self._number, self._next = list(stacks), number, 0

  def __call__(self, name: str, value: T) -> T:
    return (jax.tree.map(self._put, value) if name in remat.NAMES else value)

  def _put(self, x):
    n, self._next = self._next, self._next + 1
    self.stacks[n] = _written(self.stacks[n], x, self._number)
    return _read(self.stacks[n], self._number)


class Replay:
  """A `Keep` that gives a layer's values back, in the order of the calls."""

  def __init__(self, values: Sequence[jax.Array]):
    self._values = iter(values)

  def __call__(self, name: str, value: T) -> T:
    if name not in remat.NAMES:
      return value
    return jax.tree.map(lambda x: _instead(x, next(self._values)), value)


def _written(stack, x, number):
  return jax.lax.dynamic_update_index_in_dim(
      stack, x, number, 0, allow_negative_indices=False)


def _read(stack, number):
  return jax.lax.dynamic_index_in_dim(
      stack, number, keepdims=False, allow_negative_indices=False)


@jax.custom_vjp
def _instead(value, saved):
  """`saved`, with the gradient of `value`, which it is."""
  del value
  return saved


_instead.defvjp(lambda value, saved: (saved, None), lambda _, g: (g, None))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan(
    body: Body, shared: types.Tree, carry: types.Tree, xs: types.Tree
) -> tuple[types.Tree, types.Tree]:
  """`lax.scan` of a layer that keeps the values of `remat.NAMES`.

  Args:
    body: a layer; it must not close over traced values.
    shared: what all layers see; not differentiated.
    carry: of the first layer.
    xs: leaves `[l, ...]`; what is not differentiated by the caller costs
      nothing.

  Returns:
    The last carry, and the stacked outputs.
  """
  return jax.lax.scan(
      lambda carry, xs: body(shared, carry, xs, keep_lib.named), carry, xs)


def _forward(body, shared, carry, xs):
  """`scan`, and what `_backward` needs; arguments as `CustomVJPPrimal`s."""
  trained = jax.tree.map(lambda p: p.value if p.perturbed else None, xs)
  frozen = jax.tree.map(lambda p: None if p.perturbed else p.value, xs)
  shared, carry, xs = jax.tree.map(lambda p: p.value, (shared, carry, xs))
  depth = jax.tree.leaves(xs)[0].shape[0]

  def shapes(carry, xs):
    keep = Shapes()
    body(shared, carry, xs, keep)
    found.extend(keep.found)

  found: list[jax.ShapeDtypeStruct] = []
  jax.eval_shape(shapes, carry, jax.tree.map(lambda x: x[0], xs))
  empty = lambda number, like: jax.lax.empty((number, *like.shape), like.dtype)
  # One more: a layer's output is the next one's input.
  inputs = jax.tree.map(
      lambda x: _written(empty(depth + 1, x), x, 0), carry)

  def step(state, xs):
    number, inputs, stacks = state
    keep = Record(stacks, number)
    carry, ys = body(
        shared, jax.tree.map(lambda s: _read(s, number), inputs), xs, keep)
    inputs = jax.tree.map(
        lambda s, x: _written(s, x, number + 1), inputs, carry)
    return (number + 1, inputs, keep.stacks), ys

  (_, inputs, stacks), ys = jax.lax.scan(
      step, (jnp.int32(0), inputs, [empty(depth, like) for like in found]), xs)
  out = jax.tree.map(lambda s: s[depth], inputs)
  return (out, ys), (inputs, stacks, shared, trained, frozen)


def _backward(body, residuals, cotangents):
  inputs, stacks, shared, trained, frozen = residuals
  d_carry, d_ys = cotangents
  depth = jax.tree.leaves((trained, frozen))[0].shape[0]

  def step(state, xs):
    number, d_carry = state
    trained, frozen, d_ys = xs
    carry, values = jax.tree.map(
        lambda s: _read(s, number), (inputs, stacks))

    def layer(carry, trained):
      return body(
          shared, carry, trees.combine(trained, frozen), Replay(values))

    _, pullback = jax.vjp(layer, carry, trained)
    d_carry, d_trained = pullback((d_carry, d_ys))
    return (number - 1, d_carry), d_trained

  (_, d_carry), d_trained = jax.lax.scan(
      step, (jnp.int32(depth - 1), d_carry), (trained, frozen, d_ys),
      depth, reverse=True)
  return None, d_carry, d_trained


def _dense_backward(body, residuals, cotangents):
  return _backward(body, residuals, jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype) if _is_zero(x) else x, cotangents,
      is_leaf=_is_zero))


def _is_zero(x: Any) -> bool:
  return isinstance(x, jax.custom_derivatives.SymbolicZero)


scan.defvjp(_forward, _dense_backward, symbolic_zeros=True)
