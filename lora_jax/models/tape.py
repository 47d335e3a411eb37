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
reads any more. The layer's own input is kept in the same way. These are three
of `keep.Keep`.

Under `vmap` the scan is one over layers of all members, whose values stand side
by side as those of one larger batch do, and not one scan a member: what a layer
makes for all is written where it stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
from typing import Any, TypeVar

import jax
import jax.extend.core as extend
from jax.interpreters import partial_eval
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
      with the values. Of members `[l, m, ...]`.
    member: what says, in a layer under `vmap`, that there are members.
  """

  def __init__(self, stacks: Sequence[jax.Array], number: jax.Array):
    self.stacks, self._number, self._next = list(stacks), number, 0
    self.member: jax.Array | None = None

  def __call__(self, name: str, value: T) -> T:
    return (jax.tree.map(self._put, value) if name in remat.NAMES else value)

  def _put(self, x):
    if self.member is None:
      return self._write(x)
    put: Any = jax.custom_batching.custom_vmap(lambda x, member: x)

    @put.def_vmap
    def _(size, batched, x, member):
      del member  # Has members, whether x has or not.
      return self._write(_of_all(size, batched[0], x)), True

    return put(x, self.member)

  def _write(self, x):
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
  run: Any = jax.custom_batching.custom_vmap(_pruned(
      functools.partial(_recorded, body, None, None)))

  @run.def_vmap
  def _(size, batched, shared, carry, xs):
    carry = jax.tree.map(
        functools.partial(_of_all, size), batched[1], carry)
    out, ys, *stacks = _recorded(
        body, size, batched, shared, carry, _layers_first(batched[2], xs))
    ys = jax.tree.map(lambda y: jnp.moveaxis(y, 1, 0), ys)
    found = (out, ys, *jax.tree.map(_swapped, stacks))
    return found, jax.tree.map(lambda _: True, found)

  out, ys, inputs, stacks = run(shared, carry, xs)
  return (out, ys), (inputs, stacks, shared, trained, frozen)


def _recorded(body, size, batched, shared, carry, xs):
  """The last carry, the outputs, and stacks of layers' inputs and values.

  Args:
    body, shared, carry, xs: as of `scan`; of `size` members, if not None, whose
      axis is the first, in `xs` behind that of layers. All carries have it, and
      what `batched` (shared, carry, xs) says.
  """
  depth = jax.tree.leaves(xs)[0].shape[0]

  def shapes(shared, carry, xs):
    trees = shared, carry, jax.tree.map(lambda x: x[0], xs)
    if size is not None:
      flags = batched[0], jax.tree.map(lambda _: True, carry), batched[2]
      trees = jax.tree.map(lambda one, x: x[0] if one else x, flags, trees)
    keep = Shapes()
    body(*trees, keep)
    found.extend(keep.found)

  found: list[jax.ShapeDtypeStruct] = []
  jax.eval_shape(shapes, shared, carry, xs)
  lead = (depth,) if size is None else (depth, size)
  empty = jax.lax.empty
  # One more: a layer's output is the next one's input.
  inputs = jax.tree.map(lambda x: _written(
      empty((depth + 1, *x.shape), x.dtype), x, 0), carry)
  numbers = None if size is None else jnp.arange(size)

  def step(state, xs):
    number, inputs, stacks = state
    keep = Record(stacks, number)

    def layer(shared, carry, xs, keep_member):
      keep.member = keep_member
      return body(shared, carry, xs, keep)

    arguments = (
        shared, jax.tree.map(lambda s: _read(s, number), inputs), xs, numbers)
    carry, ys = (layer if size is None else _of_members(
        layer, size, (batched[0], None, batched[2], None)))(*arguments)
    inputs = jax.tree.map(
        lambda s, x: _written(s, x, number + 1), inputs, carry)
    return (number + 1, inputs, keep.stacks), ys

  stacks = [empty((*lead, *like.shape), like.dtype) for like in found]
  (_, inputs, stacks), ys = jax.lax.scan(
      step, (jnp.int32(0), inputs, stacks), xs)
  return jax.tree.map(lambda s: s[depth], inputs), ys, inputs, stacks


def _backward(body, residuals, cotangents):
  inputs, stacks, shared, trained, frozen = residuals
  run: Any = jax.custom_batching.custom_vmap(_pruned(
      functools.partial(_replayed, body, None, None)))

  @run.def_vmap
  def _(size, batched, kept, shared, d_carry, xs):
    kept = jax.tree.map(
        lambda one, s: _swapped(s) if one else s, batched[0], kept)
    d_carry = jax.tree.map(
        functools.partial(_of_all, size), batched[2], d_carry)
    d_carry, d_trained = _replayed(
        body, size, batched, kept, shared, d_carry,
        _layers_first(batched[3], xs))
    found = d_carry, jax.tree.map(
        lambda x: jnp.moveaxis(x, 1, 0), d_trained)
    return found, jax.tree.map(lambda _: True, found)

  d_carry, d_ys = cotangents
  d_carry, d_trained = run(
      (inputs, stacks), shared, d_carry, (trained, frozen, d_ys))
  return None, d_carry, d_trained


def _replayed(body, size, batched, kept, shared, d_carry, xs):
  """Cotangents of the first carry and of what is trained; see `_recorded`."""
  depth = jax.tree.leaves(xs)[0].shape[0]

  def layer(kept, shared, d_carry, xs):
    (carry, values), (trained, frozen, d_ys) = kept, xs
    _, pullback = jax.vjp(lambda carry, trained: body(
        shared, carry, trees.combine(trained, frozen), Replay(values)),
                          carry, trained)
    return pullback((d_carry, d_ys))

  if size is not None:
    layer = _of_members(layer, size, (*batched[:2], None, batched[3]))

  def step(state, xs):
    number, d_carry = state
    now = jax.tree.map(lambda s: _read(s, number), kept)
    d_carry, d_trained = layer(now, shared, d_carry, xs)
    return (number - 1, d_carry), d_trained

  (_, d_carry), d_trained = jax.lax.scan(
      step, (jnp.int32(depth - 1), d_carry), xs, depth, reverse=True)
  return d_carry, d_trained


def _pruned(function):
  """`function` without what is computed and not read: jax takes that out of a
  program's scans, but does not look for it behind a rule for `vmap`."""

  def run(*arguments):
    closed, like = jax.make_jaxpr(function, return_shape=True)(*arguments)
    jaxpr, _ = partial_eval.dce_jaxpr(
        closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)
    found = extend.jaxpr_as_fun(closed.replace(jaxpr=jaxpr))(
        *jax.tree.leaves(arguments))
    return jax.tree.unflatten(jax.tree.structure(like), found)

  return run


def _of_members(function, size, batched):
  """`function` of trees, of all members at once.

  Args:
    function: of one member's.
    size: how many there are.
    batched: of each tree, which of its leaves have their axis in front; None
      for all.
  """
  def run(*arguments):
    flags = [jax.tree.map(lambda _: True, tree) if some is None else some
             for some, tree in zip(batched, arguments, strict=True)]
    leaves, structure = jax.tree.flatten(arguments)
    axes = [0 if one else None for one in jax.tree.leaves(flags)]
    return jax.vmap(
        lambda *leaves: function(*jax.tree.unflatten(structure, leaves)),
        axes, axis_size=size)(*leaves)

  return run


def _of_all(size, batched, x):
  return x if batched else jnp.broadcast_to(x, (size, *x.shape))


def _layers_first(batched, xs):
  return jax.tree.map(
      lambda one, x: jnp.moveaxis(x, 0, 1) if one else x, batched, xs)


def _swapped(stack):
  """A stack `[m, l, ...]`, as `vmap` sees it between the two scans, is
  `[l, m, ...]` in memory: the axes change their order, the elements do not."""
  m, l, *rest = stack.shape
  return stack.reshape(l, m, *rest)


def _dense_backward(body, residuals, cotangents):
  return _backward(body, residuals, jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype) if _is_zero(x) else x, cotangents,
      is_leaf=_is_zero))


def _is_zero(x: Any) -> bool:
  return isinstance(x, jax.custom_derivatives.SymbolicZero)


scan.defvjp(_forward, _dense_backward, symbolic_zeros=True)
