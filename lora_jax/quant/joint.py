"""Frozen products and low-rank ones in one: `x [W_1 .. W_n] + (x A) B`.

As products of their own, `x A`, `h B` and their transposes read and write
activations that dwarf the factors: in a 7B model's step on an H100 they take
14% of the time for 1% of the arithmetic. Here B stands below the dequantised
weights, in their buffer, and x A beside x:

  y           = [x  x A] [W ; B]
  [g W^T  g B^T] = g [W ; B]^T              dx = g W^T + (g B^T) A^T

so that the frozen product, some columns wider, computes both. Projections that
read the same x share its copy and are one product. Whoever needs A^T W (DoRA's
norms) gets it of the same buffer, which is read once more.
"""

from __future__ import annotations

from collections.abc import Sequence
import functools

import jax
from jax import ad_checkpoint
import jax.numpy as jnp

from lora_jax import types
from lora_jax.quant import base
from lora_jax.quant import registry

# Columns beside x come in multiples: what matrix units and copies like.
MULTIPLE = 64

Weights = Sequence[types.Array | base.QuantizedArray]


def matmul(
    x: types.Array, weights: Weights, a: types.Array, b: types.Array
) -> types.Array:
  """`x [W_1 .. W_n] + (x A) B`, `[..., o]` in `x.dtype`.

  Weights are frozen: they have no gradient, and the backward pass dequantises
  them again, so that only their codes live between the two passes.

  Args:
    x: `[..., i]`.
    weights: `[i, o_1]` to `[i, o_n]`, arrays or quantised.
    a: `[i, r]` float32.
    b: `[r, o]` float32, o the sum of theirs.
  """
  return _joint(False, x, tuple(weights), a, b)[0]


def matmul_and_cross(
    x: types.Array, weights: Weights, a: types.Array, b: types.Array
) -> tuple[types.Array, types.Array]:
  """`matmul`, and `A^T [W_1 .. W_n]` `[r, o]` float32, without a gradient.

  The operands of the latter are rounded to `x.dtype`, its sums are not.
  """
  y, cross = _joint(True, x, tuple(weights), a, b)
  assert cross is not None
  return y, jax.lax.stop_gradient(cross)


def _buffer(weights: Weights, b: types.Array, below: int, dtype) -> jax.Array:
  """`[W_1 .. W_n ; B]` with zeros below, `[i + below, o]`."""
  b = jnp.pad(b.astype(dtype), ((0, below - b.shape[0]), (0, 0)))
  first = weights[0]
  if isinstance(first, base.QuantizedArray) and all(
      isinstance(w, type(first)) and w.block_size == first.block_size
      and w.joinable for w in weights):
    # Codes and scales of columns are theirs alone: they are joined before.
    return first.joined(weights).dequantize(dtype, below=b)
  whole = [registry.dequantize(w, dtype) for w in weights]
  return jnp.concatenate([jnp.concatenate(whole, axis=1), b])


def _low(x: types.Array, tall: types.Array):
  """x beside x A, `[..., i + below]`, and x A, `[..., below]`."""
  i, below = x.shape[-1], tall.shape[-1]
  # Zeros first, so that what makes x writes here, and x A is put in place: no
  # copy of x. Without the barrier XLA makes it a concatenation.
  wide = jax.lax.optimization_barrier(
      jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, below),)))
  low = ad_checkpoint.checkpoint_name(wide @ tall, "low")
  return jax.lax.dynamic_update_slice_in_dim(wide, low, i, axis=-1), low


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _joint(crosses, x, weights, a, b):
  return _forward(crosses, x, weights, a, b)[0]


def _forward(crosses, x, weights, a, b):
  r = a.shape[1]
  below = -(-r // MULTIPLE) * MULTIPLE
  # A, and zeros where B and the columns of its padding are.
  tall = jnp.pad(a.astype(x.dtype), ((0, below), (0, below - r)))
  wide, low = _low(x, tall)
  buffer = _buffer(weights, b, below, x.dtype)
  cross = None
  if crosses:
    cross = jnp.matmul(
        tall.T, buffer, preferred_element_type=jnp.float32)[:r]
  return (wide @ buffer, cross), (x, low, weights, a, b)


def _backward(crosses, residuals, cotangents):
  del crosses
  x, low, weights, a, b = residuals
  g, _ = cotangents
  # See `linear`.
  weights, g = jax.lax.optimization_barrier((weights, g))
  i, r = a.shape
  wide = g @ _buffer(weights, b, low.shape[-1], g.dtype).T
  d_low = wide[..., i : i + r]
  d_x = wide[..., :i] + d_low @ a.astype(g.dtype).T
  outer = lambda left, right: jnp.einsum(
      "...i,...o->io", left, right, preferred_element_type=jnp.float32)
  return d_x, None, outer(x, d_low), outer(low[..., :r], g)


_joint.defvjp(_forward, _backward)
