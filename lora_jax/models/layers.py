"""The parts of a decoder without parameters of ours."""

from __future__ import annotations

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp

from lora_jax import types

ACTIVATIONS: dict[str, Callable[[types.Array], types.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}


def rms_norm(
    x: types.Array, weight: types.Array, eps: float, offset: int = 0,
    apart: bool = False
) -> types.Array:
  """`weight * x / rms(x)`; the statistics in float32, rounded, then scaled.

  Source: Zhang and Sennrich 2019 (1910.07467), equation 4, rounded where
  transformers rounds: with an offset, after scaling in float32 (Gemma).

  Args:
    x: `[..., d]`.
    weight: `[d]`.
    eps: added to the mean square.
    offset: added to the weight.
    apart: whether the statistics are computed on their own. XLA then reads x
      twice, but can do the rest together with what comes before and after;
      both at once would be a kernel that takes nothing else in.

  Returns:
    `[..., d]` in `x.dtype`.
  """
  wide = x.astype(jnp.float32)
  square = jnp.mean(wide * wide, axis=-1, keepdims=True)
  scale = jax.lax.rsqrt(square + eps)
  normed = wide * (jax.lax.optimization_barrier(scale) if apart else scale)
  if offset:
    return (normed * (offset + weight.astype(jnp.float32))).astype(x.dtype)
  return weight.astype(x.dtype) * normed.astype(x.dtype)


def soft_cap(x: types.Array, cap: float | None) -> types.Array:
  """`cap * tanh(x / cap)`, in x's type; x itself if the cap is None.

  Source: Gemma 2 (2408.00118), section 2.
  """
  return x if cap is None else cap * jnp.tanh(x / cap)
