"""RMSNorm and attention: the parts of a decoder without parameters of ours."""

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
    x: types.Array, weight: types.Array, eps: float, offset: int = 0
) -> types.Array:
  """`weight * x / rms(x)`; the statistics in float32, rounded, then scaled.

  Source: Zhang and Sennrich 2019 (1910.07467), equation 4, rounded where
  transformers rounds: with an offset, after scaling in float32 (Gemma).

  Args:
    x: `[..., d]`.
    weight: `[d]`.
    eps: added to the mean square.
    offset: added to the weight.

  Returns:
    `[..., d]` in `x.dtype`.
  """
  wide = x.astype(jnp.float32)
  square = jnp.mean(wide * wide, axis=-1, keepdims=True)
  normed = wide * jax.lax.rsqrt(square + eps)
  if offset:
    return (normed * (offset + weight.astype(jnp.float32))).astype(x.dtype)
  return weight.astype(x.dtype) * normed.astype(x.dtype)


def soft_cap(x: types.Array, cap: float | None) -> types.Array:
  """`cap * tanh(x / cap)`, in x's type; x itself if the cap is None.

  Source: Gemma 2 (2408.00118), section 2.
  """
  return x if cap is None else cap * jnp.tanh(x / cap)


def visible(
    q_positions: types.Array,
    kv_positions: types.Array,
    q_segments: types.Array,
    kv_segments: types.Array,
    window: types.Array | int | None = None,
) -> types.Array:
  """The one mask rule, for padded, packed and cached rows.

  A query sees a key iff both are of the same segment, which is not padding,
  the key is not later, and it is less than `window` positions back.

  Args:
    q_positions: `[b, t]`.
    kv_positions: `[b, s]`.
    q_segments: `[b, t]`, 0 on padding.
    kv_segments: `[b, s]`, 0 on padding and on empty cache slots.
    window: tokens seen, itself included; None is unlimited.

  Returns:
    `[b, t, s]` bool.
  """
  back = q_positions[:, :, None] - kv_positions[:, None, :]
  same = q_segments[:, :, None] == kv_segments[:, None, :]
  mask = same & (kv_segments != 0)[:, None, :] & (back >= 0)
  return mask if window is None else mask & (back < window)


def attention(
    q: types.Array,
    k: types.Array,
    v: types.Array,
    q_positions: types.Array,
    kv_positions: types.Array,
    q_segments: types.Array,
    kv_segments: types.Array,
    window: types.Array | int | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> types.Array:
  """Grouped-query attention; query head n reads kv head n // (h / k).

  It takes positions and segments, not a mask, so that a kernel that never
  builds the mask can stand here.

  Args:
    q: `[b, t, h, e]`.
    k: `[b, s, k, e]`.
    v: `[b, s, k, e]`.
    q_positions: `[b, t]`; see `visible`.
    kv_positions: `[b, s]`.
    q_segments: `[b, t]`.
    kv_segments: `[b, s]`.
    window: see `visible`.
    scale: of the scores; None is 1 / sqrt(e).
    softcap: see `soft_cap`, of the scaled scores.

  Returns:
    `[b, t, h, e]` in `q.dtype`; the softmax is float32. Rows that see no
    key (padding) are finite and mean nothing.
  """
  mask = visible(
      q_positions, kv_positions, q_segments, kv_segments, window)
  if softcap is None:
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask[:, None], scale=scale, implementation="xla")
  b, t, h, e = q.shape
  grouped = q.reshape(b, t, k.shape[2], -1, e)
  scores = jnp.einsum(
      "btkge,bske->bkgts", grouped, k, preferred_element_type=jnp.float32)
  scores = soft_cap(scores * (e**-0.5 if scale is None else scale), softcap)
  # Finite, so that rows that see nothing have a softmax.
  scores = jnp.where(
      mask[:, None, None], scores, 0.7 * jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  out = jnp.einsum("bkgts,bske->btkge", weights, v)
  return out.reshape(b, t, h, e).astype(q.dtype)
