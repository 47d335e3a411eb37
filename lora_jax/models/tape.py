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

Under `vmap` a layer's values of all members stay together, as of one larger
batch, so that they too are written where they stay: see `_swapped`.

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


@jax.custom_batching.custom_vmap
def _written(stack, x, number):
  return jax.lax.dynamic_update_index_in_dim(
      stack, x, number, 0, allow_negative_indices=False)


@jax.custom_batching.custom_vmap
def _read(stack, number):
  return jax.lax.dynamic_index_in_dim(
      stack, number, keepdims=False, allow_negative_indices=False)


def _empty(depth, like, given):
  """A stack of values like one; of each member if any of `given` is."""

  @jax.custom_batching.custom_vmap
  def empty(*given):
    del given
    return jax.lax.empty((depth, *like.shape), like.dtype)

  @empty.def_vmap
  def _(size, batched, *given):
    del batched
    whole = jax.ShapeDtypeStruct((size, *like.shape), like.dtype)
    return _swapped(_empty(depth, whole, given)), True

  return empty(*given)


@_written.def_vmap
def _(size, batched, stack, x, number):
  stack, x = (_of_all(size, *one) for one in zip(batched, (stack, x)))
  return _swapped(
      _written(_swapped(stack), x, number)), True


@_read.def_vmap
def _(size, batched, stack, number):
  del size, batched
  return _read(_swapped(stack), number), True


def _of_all(size, batched, x):
  return x if batched else jnp.broadcast_to(x, (size, *x.shape))


def _swapped(stack):
  """A stack `[m, l, ...]`, as `vmap` sees it, is `[l, m, ...]` in memory.

  The axes change their order, the elements do not: nobody but `_read` looks
  into a stack, and what is made for all members is written in place.
  """
  m, l, *rest = stack.shape
  return stack.reshape(l, m, *rest)


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
  given = jax.tree.leaves((shared, carry, xs))
  zero, last = jnp.int32(0), jnp.int32(depth)
  # One more: a layer's output is the next one's input.
  inputs = jax.tree.map(
      lambda x: _written(_empty(depth + 1, x, given), x, zero), carry)

  def step(state, xs):
    number, inputs, stacks = state
    keep = Record(stacks, number)
    carry, ys = body(
        shared, jax.tree.map(lambda s: _read(s, number), inputs), xs, keep)
    inputs = jax.tree.map(
        lambda s, x: _written(s, x, number + 1), inputs, carry)
    return (number + 1, inputs, keep.stacks), ys

  (_, inputs, stacks), ys = jax.lax.scan(
      step, (zero, inputs, [_empty(depth, like, given) for like in found]), xs)
  out = jax.tree.map(lambda s: _read(s, last), inputs)
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
