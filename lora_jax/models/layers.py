"""RMSNorm and attention: the parts of a decoder without parameters of ours."""

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

  Returns:
    `[b, t, h, e]` in `q.dtype`; the softmax is float32. Rows that see no
    key (padding) are finite and mean nothing.
  """
  mask = visible(
      q_positions, kv_positions, q_segments, kv_segments, window)
  def attend(q, k, v):
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask[:, None], implementation="xla")

  if q.dtype != jnp.float16:
    return attend(q, k, v)

  def wide(*qkv):
    return attend(*(x.astype(jnp.float32) for x in qkv)).astype(q.dtype)

  # XLA's CPU backend has no float16 product with a float32 sum.
  return jax.lax.platform_dependent(q, k, v, cpu=wide, default=attend)
