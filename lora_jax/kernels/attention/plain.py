"""Attention with its mask and its probabilities in memory: always exact."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lora_jax import types
from lora_jax.kernels.attention import base

# The segment of keys that every segment sees.
EVERY = -1


def visible(
    q_positions: types.Array,
    kv_positions: types.Array,
    q_segments: types.Array,
    kv_segments: types.Array,
    window: types.Array | int | None = None,
) -> types.Array:
  """The one mask rule, for padded, packed and cached rows.

  A query sees a key iff both are of the same segment, which is not padding
  (or the key belongs to `EVERY` one), the key is not later, and it is less
  than `window` positions back.

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
  same |= (kv_segments == EVERY)[:, None, :]
  mask = same & (kv_segments != 0)[:, None, :] & (back >= 0)
  return mask if window is None else mask & (back < window)


def mask(call: base.Call) -> types.Array:
  """`visible` of a call, `[b, 1, t, s]`: the same for all heads."""
  return visible(
      call.q_positions, call.kv_positions, call.q_segments,
      call.kv_segments, call.window)[:, None]


def refuses(call: base.Call) -> str | None:
  """Nothing is refused."""
  del call
  return None


def run(call: base.Call) -> types.Array:
  """`softmax(mask(cap(scale q k^T))) v`, the softmax in float32."""
  seen = mask(call)

  def attend(q, k, v):
    if call.softcap is None:
      return jax.nn.dot_product_attention(
          q, k, v, mask=seen, scale=call.scale, implementation="xla")
    return _capped(q, k, v, seen, call.scale, call.softcap)

  return base.wide_on_cpu(attend, call.q, call.k, call.v)


def _capped(q, k, v, seen, scale, softcap):
  """With `softcap * tanh(logits / softcap)` (Gemma 2, 2408.00118, 2.1)."""
  b, t, h, e = q.shape
  grouped = q.reshape(b, t, k.shape[2], -1, e)
  logits = jnp.einsum(
      "btkge,bske->bkgts", grouped, k, preferred_element_type=jnp.float32)
  logits = logits * (e ** -0.5 if scale is None else scale)
  logits = softcap * jnp.tanh(logits / softcap)
  # Not -inf: a row that sees no key stays finite, and so does its gradient.
  logits = jnp.where(
      seen[:, :, None], logits, -0.7 * jnp.finfo(jnp.float32).max)
  weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
  return jnp.einsum("bkgts,bske->btkge", weights, v).reshape(b, t, h, e)
