"""The parts of a decoder without parameters of ours."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lora_jax import types


def rms_norm(
    x: types.Array, weight: types.Array, eps: float
) -> types.Array:
  """`weight * x / rms(x)`; the statistics in float32, rounded, then scaled.

  Source: Zhang and Sennrich 2019 (1910.07467), equation 4, rounded where
  transformers rounds.

  Args:
    x: `[..., d]`.
    weight: `[d]`.
    eps: added to the mean square.

  Returns:
    `[..., d]` in `x.dtype`.
  """
  wide = x.astype(jnp.float32)
  square = jnp.mean(wide * wide, axis=-1, keepdims=True)
  normed = (wide * jax.lax.rsqrt(square + eps)).astype(x.dtype)
  return weight.astype(x.dtype) * normed
