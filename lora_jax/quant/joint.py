"""Frozen products and low-rank ones in one: `x W_k + (x A_k) B_k`.

As products of their own, `x A`, `h B` and their transposes read and write
activations that dwarf the factors: in a 7B model's step on an H100 they take
14% of the time for 1% of the arithmetic. Here B stands below the dequantised
weight, in its buffer, and x A beside x:

  y_k            = [x  x A] [W_k ; B_k]
  [dx  d(x A)]   = sum_k g_k [W_k ; B_k]^T,     dx += d(x A) A^T

so that the frozen product, some columns wider, computes both. Projections that
read the same x share `[x  x A]`, A being theirs side by side: B_k has zero rows
for those of the others. Whoever needs A^T W (DoRA's norms) gets it of the same
buffer, which is read once more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import types
from lora_jax.quant import base
from lora_jax.quant import registry

# Columns beside x come in multiples: what matrix units and copies like.
MULTIPLE = 64


def matmul(
    x: types.Array,
    weights: Sequence[types.Array | base.QuantizedArray],
    factors: Sequence[tuple[types.Array, types.Array]],
    keep: Callable[[str, Any], Any] = lambda name, value: value,
    crosses: bool = False,
) -> list[tuple[jax.Array, jax.Array | None]]:
  """`x W_k + (x A_k) B_k` of each k, `[..., o_k]` in `x.dtype`.

  Weights are frozen: they have no gradient, and the backward pass dequantises
  them again, so that only their codes live between the two passes.

  Args:
    x: `[..., i]`.
    weights: `[i, o_k]`, arrays or quantised.
    factors: (A_k `[i, r_k]`, B_k `[r_k, o_k]`), float32.
    keep: is given "low" and x A, and gives it back; see `models.tape`.
    crosses: whether to compute A_k^T W_k `[r_k, o_k]` float32 as well, without
      a gradient. Its operands are rounded to `x.dtype`, its sums are not.

  Returns:
    (product, A_k^T W_k or None) of each.
  """
  ranks = [a.shape[1] for a, _ in factors]
  below = -(-sum(ranks) // MULTIPLE) * MULTIPLE
  a = jnp.concatenate([a for a, _ in factors], axis=1)
  wide, low = _low(x, a, below)
  starts = np.cumsum([0, *ranks[:-1]]).tolist()
  tall = jax.lax.stop_gradient(_tall(a, below, x.dtype)) if crosses else None
  products, found = _joint(
      tuple(starts), wide, keep("low", low), tuple(weights),
      tuple(b for _, b in factors), tall)
  return list(zip(products, found, strict=True))


def _outer(left: jax.Array, right: jax.Array) -> jax.Array:
  """`left^T right` `[i, o]` float32, a sum over tokens."""
  # Of one axis: under `vmap`, XLA would transpose `left` for a sum over two.
  left, right = (
      x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) for x in (left, right))
  return jnp.einsum(
      "ni,no->io", left, right, preferred_element_type=jnp.float32)


def _tall(a, below, dtype) -> jax.Array:
  """A `[i + below, below]`, zero where B and the columns of padding are."""
  return jnp.pad(a.astype(dtype), ((0, below), (0, below - a.shape[1])))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _low(x, a, below):
  """x beside zeros, `[..., i + below]`, and x A beside zeros, `[..., below]`.

  Zeros first, so that what makes x writes here and x A is put in place: no
  copy of x. Without the barrier XLA makes it a concatenation.
  """
  wide = jax.lax.optimization_barrier(
      jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, below),)))
  return wide, wide @ _tall(a, below, x.dtype)


def _low_forward(x, a, below):
  return _low(x, a, below), (x, a)


def _low_backward(below, residuals, cotangents):
  del below
  (x, a), (d_wide, d_low) = residuals, cotangents
  i, r = a.shape
  d_low = d_low[..., :r]
  # What reads d_x can add the two. XLA would have the product do it, which
  # needs a copy of the first without its last columns.
  last = jax.lax.optimization_barrier(d_low @ a.astype(x.dtype).T)
  return d_wide[..., :i] + last, _outer(x, d_low)


_low.defvjp(_low_forward, _low_backward)


def _buffer(weight, b, start, below, dtype) -> jax.Array:
  """`[W ; B]`, `[i + below, o]`, B's rows from the one at `start` on."""
  return _extended(weight, jnp.pad(
      b.astype(dtype), ((start, below - start - b.shape[0]), (0, 0))))


def _extend(weight, b):
  if isinstance(weight, base.QuantizedArray) and weight.extensible:
    return weight.dequantize(b.dtype, below=b)
  return jnp.concatenate([registry.dequantize(weight, b.dtype), b])


_extended: Any = jax.custom_batching.custom_vmap(_extend)


@_extended.def_vmap
def _(size, batched, weight, b):
  """Dequantises once what all share, and copies that."""
  if any(jax.tree.leaves(batched[0])):
    axes = jax.tree.map(lambda one: 0 if one else None, tuple(batched))
    return jax.vmap(_extend, axes)(weight, b), True
  values = registry.dequantize(weight, b.dtype)
  return jnp.concatenate(
      [jnp.broadcast_to(values, (size, *values.shape)), b], axis=-2), True


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _joint(starts, wide, low, weights, factors, tall):
  below = low.shape[-1]
  wide = jax.lax.dynamic_update_slice_in_dim(
      wide, low, wide.shape[-1] - below, axis=-1)
  products, crosses = [], []
  for start, weight, b in zip(starts, weights, factors, strict=True):
    buffer = _buffer(weight, b, start, below, wide.dtype)
    products.append(wide @ buffer)
    crosses.append(None if tall is None else jnp.matmul(
        tall.T, buffer, preferred_element_type=jnp.float32)[
            start : start + b.shape[0]])
  return tuple(products), tuple(crosses)


def _forward(starts, wide, low, weights, factors, tall):
  return (_joint(starts, wide, low, weights, factors, tall),
          (low, weights, factors))


def _backward(starts, residuals, cotangents):
  (low, weights, factors), (g, _) = residuals, cotangents
  below = low.shape[-1]

  def back(start, weight, b, one):
    if isinstance(weight, base.QuantizedArray):
      weight, one = weight.after(one)
    return one @ _buffer(weight, b, start, below, one.dtype).T

  d_wide = sum(map(back, starts, weights, factors, g))
  d_low = d_wide[..., -below:]
  return d_wide, d_low, None, tuple(
      _outer(low[..., start : start + b.shape[0]], one)
      for start, b, one in zip(starts, factors, g, strict=True)), None


_joint.defvjp(_forward, _backward)
