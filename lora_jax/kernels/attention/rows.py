"""A kernel of attention in two calls: forwards, and backwards from its sums.

By itself a kernel's gradient runs it again for what it keeps (the sums of the
softmax), whatever `remat` keeps. Here they are an output, which goes into
`keep` with the other. Nothing of this is in jax's public interface but that a
pullback is a tree: its leaves that are no operands are what was kept.

Each row is computed by itself, so that what `vmap` adds is only more rows: the
kernel is called once, on all of them. (jax's own rule for cuDNN's attention
fails where a mask serves all heads, 0.11.2.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import types

# `(q, k, v, *others) -> out`, all with the rows first; differentiable by the
# first three.
Attend = Callable[..., types.Array]


def forward(
    attend: Attend, operands: Sequence[types.Array]
) -> tuple[types.Array, ...]:
  """`attend(*operands)` and what its gradient needs beside, without one."""

  def run(*operands):
    out, leaves, _ = _pullback(attend, operands)
    return (out, *(x for x in leaves if _is_kept(x, (*operands, out))))

  return _by_rows(run)(*map(jax.lax.stop_gradient, operands))


def attached(
    attend: Attend,
    operands: Sequence[types.Array],
    found: tuple[types.Array, ...],
) -> types.Array:
  """The output that `forward` found, with its gradient by q, k and v."""

  def gradients(g, found, *operands):
    # Nothing reads what would compute these again.
    out, leaves, structure = _pullback(attend, operands)
    sums = iter(found[1:])
    leaves = [
        found[0] if x is out
        else next(sums) if _is_kept(x, (*operands, out)) else x
        for x in leaves]
    return jax.tree.unflatten(structure, leaves)(g)

  @jax.custom_vjp
  def run(found, *operands):
    del operands
    return found[0]

  def backward(kept, g):
    found, operands = kept
    return (None, *_by_rows(gradients)(g, found, *operands),
            *[None] * len(operands[3:]))

  run.defvjp(lambda found, *operands: (found[0], (found, operands)), backward)
  return run(found, *operands)


def _pullback(attend, operands):
  """The output, and leaves and structure of what gives the gradients."""
  q, k, v, *others = operands
  out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, *others), q, k, v)
  return out, *jax.tree.flatten(pull)


def _is_kept(x, known):
  """Whether a leaf is neither known nor made of a mask alone."""
  masks = [y.shape for y in known[3:-1]]
  return (x.size > 0 and not any(x is y for y in known)
          and x.shape not in masks)


def _by_rows(function: Callable[..., Any]) -> Callable[..., Any]:
  """`function` of arrays with rows in front, which batch axes join."""
  mapped: Any = jax.custom_batching.custom_vmap(function)

  @mapped.def_vmap
  def _(size, batched, *operands):
    def joined(x, one):
      x = x if one else jnp.broadcast_to(x, (size, *x.shape))
      return x.reshape(size * x.shape[1], *x.shape[2:])

    found = mapped(*jax.tree.map(joined, operands, tuple(batched)))
    split = jax.tree.map(
        lambda x: x.reshape(size, x.shape[0] // size, *x.shape[1:]), found)
    return split, jax.tree.map(lambda _: True, found)

  return mapped
