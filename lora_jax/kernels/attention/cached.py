"""Attention of new tokens over a cache and over each other.

The cache is read where it lies and the new tokens are not in it yet: their
keys are a second part of one softmax. Whoever scans over layers then has a
cache that no layer changes, and writes all layers' new tokens into it at once,
in place.
"""

from __future__ import annotations

import functools

import jax
from jax.experimental import layout as layout_lib
import jax.numpy as jnp

from lora_jax import types
from lora_jax.kernels.attention import base
from lora_jax.kernels.attention import plain

# How the cache is multiplied. In a program for an H100, `dot` works on a copy
# of the layer's part of the cache, unless a key has one query: then XLA makes
# it a sum by itself. `sum` is fused with the slice, and reads a key again for
# every further query.
PRODUCTS = ("dot", "sum")

_MASKED = -0.7 * jnp.finfo(jnp.float32).max


def attention(
    q: types.Array,
    k: types.Array,
    v: types.Array,
    cached: tuple[types.Array, types.Array],
    q_positions: types.Array,
    kv_positions: types.Array,
    q_segments: types.Array,
    kv_segments: types.Array,
    window: types.Array | int | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    product: str = "dot",
) -> types.Array:
  """Grouped-query attention with keys in two places; see `api.attention`.

  Keys are not repeated for the query heads that share them, and the products
  run over whole rows of the cache.

  Args:
    q: `[b, t, h, e]`.
    k, v: `[b, t, k, e]`, of the queries' own tokens.
    cached: keys and values `[b, k, s, e]` of tokens before them.
    q_positions: `[b, t]`; see `plain.visible`.
    kv_positions: `[b, s]`, of the cached tokens.
    q_segments: `[b, t]`.
    kv_segments: `[b, s]`, 0 on empty slots.
    window: see `plain.visible`.
    scale: of the logits; `e ** -0.5` by default.
    softcap: see `api.attention`.
    product: one of `PRODUCTS`.

  Returns:
    `[b, t, h, e]` in `q.dtype`; the softmax is float32. Rows that see no
    key (padding) are finite and mean nothing.
  """
  b, t, h, e = q.shape
  scale = e ** -0.5 if scale is None else scale
  before = plain.visible(
      q_positions, kv_positions, q_segments, kv_segments, window)
  among = plain.visible(
      q_positions, q_positions, q_segments, q_segments, window)

  multiply = _summed if product == "sum" else functools.partial(
      jnp.einsum, preferred_element_type=jnp.float32)

  def logits(q, k, seen):
    found = scale * multiply("btkge,bkse->bkgts", q, k)
    if softcap is not None:
      found = softcap * jnp.tanh(found / softcap)
    return jnp.where(seen[:, None, None], found, _MASKED)

  def attend(q, k, v, old_k, old_v):
    grouped = q.reshape(b, t, k.shape[2], -1, e)
    old = logits(grouped, old_k.astype(q.dtype), before)
    own = logits(grouped, k.swapaxes(1, 2), among)
    top = jnp.maximum(
        old.max(-1, keepdims=True), own.max(-1, keepdims=True))
    old, own = jnp.exp(old - top), jnp.exp(own - top)
    total = old.sum(-1, keepdims=True) + own.sum(-1, keepdims=True)

    def mixed(share, values):
      return multiply("bkgts,bkse->btkge", (share / total).astype(q.dtype),
                      values.astype(q.dtype))

    out = mixed(old, old_v) + mixed(own, v.swapaxes(1, 2))
    return out.reshape(b, t, h, e).astype(q.dtype)

  return base.wide_on_cpu(
      attend, q, k, v, *map(_as_it_lies, cached),
      dtypes=(jnp.float16, jnp.bfloat16))


def _as_it_lies(x):
  """`x` in rows, as it is stored.

  A product of one query with a key becomes a sum, for which XLA on GPU would
  like another order of the axes: the whole cache would be transposed.
  """
  rows = layout_lib.Layout(major_to_minor=tuple(range(x.ndim)))
  return jax.lax.platform_dependent(
      x, cuda=lambda x: layout_lib.with_layout_constraint(x, rows),
      default=lambda x: x)


def _summed(form, x, y):
  """`einsum` in float32 of these two forms, as a sum of products."""
  wide = (x.astype(jnp.float32), y.astype(jnp.float32))
  if form == "btkge,bkse->bkgts":
    x = jnp.moveaxis(wide[0], 1, 3)[..., None, :]
    return (x * wide[1][:, :, None, None]).sum(-1)
  product = wide[0][..., None] * wide[1][:, :, None, None]
  return jnp.moveaxis(product.sum(-2), 3, 1)
