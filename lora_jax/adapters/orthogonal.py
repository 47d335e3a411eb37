"""How far the columns of a factor are from orthonormal."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lora_jax import types


def distance(factor: types.Array, used: types.Array) -> jax.Array:
  """||F^T F - I||, Frobenius and not squared, `[...]` float32.

  Args:
    factor: F `[..., n, r]`.
    used: which columns are no padding, bool `[..., r]`; padding is zero.

  Returns:
    Of every matrix; with a gradient of 0 where it is 0.
  """
  gram = jnp.einsum("...ir,...is->...rs", factor, factor, precision="highest")
  off = gram - jnp.eye(gram.shape[-1]) * jnp.asarray(used)[..., None]
  square = jnp.sum(jnp.square(off), (-1, -2))
  positive = square > 0
  return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)
