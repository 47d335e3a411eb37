"""A scan over layers whose weights, or saved values, are in host memory.

`lax.scan` with a prefetch: while layer i computes, what layer i + 1 needs is
on its way to the device (and, going back, what layer i - 1 needs). Copies run
beside the computation only if nothing in the same iteration waits for them,
so that what comes is carried to the next iteration:

  carry, ready      = carry, copy(0)
  iteration i:        coming = copy(i + 1)
                      carry = layer(carry, ready), ready = coming

A carry that were differentiated would be saved at every layer, and the whole
base with it. The backward pass is therefore written out. Forwards it keeps of
each layer what its `remat` policy does, without weights and adapters; back,
it puts them in again and pulls the cotangent through, from the last layer on.

What is in host memory is frozen. Which of the other inputs are trained is
known to the caller's `grad`; only these are differentiated.

Some layers of a stack, or some more than once, are scanned by their numbers:
each is read where it is used, as `lax.scan` reads `xs`. A part of the stack
under `jit` would be a copy of it.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
from jax import ad_checkpoint
import jax.numpy as jnp

from lora_jax import host as host_lib
from lora_jax import keep as keep_lib
from lora_jax import struct
from lora_jax import trees
from lora_jax import types
from lora_jax.models import remat as remat_lib
from lora_jax.models import tape


class Options(NamedTuple):
  """Static choices; see `scan`."""

  remat: str
  gathers: bool
  spill: bool
  order: tuple[int, ...]


def scan(
    body: tape.Body,
    shared: types.Tree,
    carry: types.Tree,
    xs: types.Tree,
    *,
    remat: str = "none",
    gathers: bool = False,
    spill: bool = False,
    stacks: types.Tree = None,
    order: tuple[int, ...] = (),
) -> tuple[types.Tree, types.Tree]:
  """`lax.scan` of a layer under a remat policy.

  Args:
    body: a layer; it must not close over traced values.
    shared: what all layers see; not differentiated.
    carry: of the first layer.
    xs: leaves `[l, ...]`; those in host memory are frozen, and on the device
      only when `body` gets them.
    remat: what the backward pass keeps, a key of `remat.POLICIES`.
    gathers: see `remat.wrap`.
    spill: whether what it keeps is kept in host memory.
    stacks: what `xs` lacks, a partial tree of its structure, frozen: the
      layer `order[n]` of each leaf is there in iteration n.
    order: static, as long as `xs`.

  Returns:
    The last carry, and the stacked outputs.
  """
  away = jax.tree.map(
      lambda x: x if host_lib.in_host(x) else None,
      xs if stacks is None else stacks)
  if stacks is not None:
    near = jax.tree.map(
        lambda x: None if host_lib.in_host(x) else x, stacks)
    body, gathers = functools.partial(_reading, body), True
    shared, xs, away = (shared, near), (jnp.asarray(order), xs), (None, away)
  if not spill and not jax.tree.leaves(away):
    if remat in remat_lib.BY_NAME:
      return tape.scan(body, shared, carry, xs)
    return jax.lax.scan(
        remat_lib.wrap(
            lambda carry, xs: body(shared, carry, xs, keep_lib.named), remat,
            gathers), carry, xs)
  rest = jax.tree.map(lambda x: None if host_lib.in_host(x) else x, xs)
  options = Options(
      remat, gathers or bool(jax.tree.leaves(away)), spill, order)
  return _scan(body, options, shared, carry, rest, away)


def _reading(body, shared, carry, xs, keep):
  """A body that is given layers out of stacks, by their numbers."""
  shared, stacks = shared
  number, xs = xs
  found = jax.tree.map(
      lambda x: ad_checkpoint.checkpoint_name(
          jax.lax.dynamic_index_in_dim(
              x, number, keepdims=False, allow_negative_indices=False),
          remat_lib.USED), stacks)
  return body(shared, carry, trees.combine(xs, found), keep)


def _depth(*stacks: types.Tree) -> int:
  return jax.tree.leaves(stacks)[0].shape[0]


def _copy(stacks: types.Tree, index: jax.Array | int) -> types.Tree:
  """A layer of stacks in host memory, on the device; the nearest there is.

  On a GPU only a copy whose place is linear in the loop's own counter, as
  XLA sees it, is one for the copy engine, of which any number may run beside
  the computation. Else it is a kernel, and two of them at a time. A number
  out of `xs`, or one that is clamped here, is not seen to be linear.
  """
  return host_lib.on_device(jax.tree.map(
      lambda x: jax.lax.dynamic_index_in_dim(
          x, index, keepdims=False, allow_negative_indices=False), stacks))


def _next(number: jax.Array) -> jax.Array:
  """`number + 1`, but not the value of the loop's own counter.

  XLA would take the one for the other, and the counter is increased in place
  once nothing reads it any more: the copies would begin at the layer's end.
  """
  return number.astype(jnp.uint32) + 1


def _place(order: tuple[int, ...], number: Any) -> Any:
  """Where the layer of iteration `number` is in its stack; see `_copy`.

  Beyond the first and the last it is any layer.
  """
  if not order:
    return number
  if order == tuple(range(order[0], order[0] + len(order))):
    return number + order[0]
  # Not linear: on a GPU these copies are kernels.
  return jax.lax.dynamic_index_in_dim(
      jnp.asarray(order), number, keepdims=False,
      allow_negative_indices=False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(body, options, shared, carry, rest, away):
  def step(state, rest):
    number, carry, ready = state
    coming = _copy(away, _place(options.order, _next(number)))
    carry, ys = body(
        shared, carry, trees.combine(ready, rest), keep_lib.named)
    return (number + 1, carry, coming), ys

  (_, carry, _), ys = jax.lax.scan(
      step, (jnp.int32(0), carry, _copy(away, _place(options.order, 0))), rest,
      _depth(rest, away))
  return carry, ys


@struct.dataclass
class _Known:
  """In place of a residual: which of the values that are at hand it is."""

  number: int = struct.field(pytree_node=False)


def _without(pullback: types.Tree, known: types.Tree) -> types.Tree:
  """A pullback's residuals without those that are leaves of `known`.

  Only memory depends on finding them: what is not found is saved.
  """
  numbers = {id(x): n for n, x in enumerate(jax.tree.leaves(known))}
  return jax.tree.map(
      lambda x: _Known(numbers[id(x)]) if id(x) in numbers else x, pullback)


def _with(saved: types.Tree, known: types.Tree) -> Callable:
  """Inverse of `_without`, for `known` of the same structure."""
  leaves = jax.tree.leaves(known)
  is_known = lambda x: isinstance(x, _Known)
  return jax.tree.map(
      lambda x: leaves[x.number] if is_known(x) else x, saved,
      is_leaf=is_known)


def _forward(body, options, shared, carry, rest, away):
  """`_scan`, and what `_backward` needs; arguments as `CustomVJPPrimal`s."""
  trained = jax.tree.map(lambda p: p.value if p.perturbed else None, rest)
  frozen = jax.tree.map(lambda p: None if p.perturbed else p.value, rest)
  shared, carry, away = jax.tree.map(lambda p: p.value, (shared, carry, away))

  def step(state, xs):
    number, carry, ready = state
    trained, frozen = xs
    coming = _copy(away, _place(options.order, _next(number)))

    def layer(carry, trained):
      weights = jax.tree.map(
          lambda x: ad_checkpoint.checkpoint_name(x, remat_lib.USED), ready)
      return body(shared, carry, trees.combine(
          trained, trees.combine(weights, frozen)), keep_lib.named)

    # Scan keeps XLA from merging the second computation with the first.
    (carry, ys), pullback = jax.vjp(
        remat_lib.wrap(layer, options.remat, options.gathers), carry, trained)
    saved = _without(pullback, (shared, trained, frozen, ready))
    if options.spill:
      saved = _spilled(saved, carry)
    return (number + 1, carry, coming), (ys, saved)

  (_, carry, last), (ys, saved) = jax.lax.scan(
      step, (jnp.int32(0), carry, _copy(away, _place(options.order, 0))),
      (trained, frozen), _depth(trained, frozen, away))
  # Of a whole stack the last copy is that of the last layer again: the first
  # one back.
  last = None if options.order else last
  return (carry, ys), (saved, shared, trained, frozen, away, last)


def _spilled(saved: types.Tree, carry: types.Tree) -> types.Tree:
  """With the large ones moved to host memory."""
  least = max(x.size for x in jax.tree.leaves(carry)) // 64
  return jax.tree.map(
      lambda x: host_lib.on_host(x) if x.size >= least else x, saved)


def _backward(body, options, residuals, cotangents):
  del body
  saved, shared, trained, frozen, away, last = residuals
  d_carry, d_ys = jax.tree.map(_dense, cotangents, is_leaf=_is_zero)
  spilled = jax.tree.map(lambda x: x if host_lib.in_host(x) else None, saved)
  near = jax.tree.map(lambda x: None if host_lib.in_host(x) else x, saved)

  depth = _depth(trained, frozen, away)

  def step(state, xs):
    number, d_carry, ready, back = state
    near, trained, frozen, d_ys = xs
    before = depth - 2 - number
    coming = (_copy(away, _place(options.order, before)),
              _copy(spilled, before))
    pullback = _with(
        trees.combine(back, near), (shared, trained, frozen, ready))
    d_carry, d_trained = pullback((d_carry, d_ys))
    return (number + 1, d_carry, *coming), d_trained

  if options.order:
    last = _copy(away, _place(options.order, depth - 1))
  start: Any = jnp.int32(0), d_carry, last, _copy(spilled, depth - 1)
  (_, d_carry, *_), d_trained = jax.lax.scan(
      step, start, (near, trained, frozen, d_ys), depth, reverse=True)
  return None, d_carry, d_trained, None


def _is_zero(x: Any) -> bool:
  return isinstance(x, jax.custom_derivatives.SymbolicZero)


def _dense(x: Any) -> Any:
  return jnp.zeros(x.shape, x.dtype) if _is_zero(x) else x


_scan.defvjp(_forward, _backward, symbolic_zeros=True)
