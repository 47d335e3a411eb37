"""Attention over a cache, by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.kernels import attention
from lora_jax.kernels.attention import cached


def by_hand(q, k, v, old, at, old_at, seen, old_seen, window, scale, softcap):
  """float64, a row, a head and a query at a time, keys one after another."""
  b, t, h, _ = q.shape
  out = np.zeros(q.shape)
  for i, n, j in np.ndindex(b, h, t):
    head = n // (h // k.shape[2])
    logits, values = [], []
    keys = [*zip(old[0][i, head], old[1][i, head], old_at[i], old_seen[i]),
            *zip(k[i, :, head], v[i, :, head], at[i], seen[i])]
    for key, value, position, segment in keys:
      back = at[i, j] - position
      if segment and segment == seen[i, j] and 0 <= back < window:
        x = scale * np.dot(q[i, j, n], key)
        logits.append(softcap * np.tanh(x / softcap) if softcap else x)
        values.append(value)
    if logits:
      share = np.exp(np.array(logits) - max(logits))
      out[i, j, n] = share @ np.array(values) / share.sum()
  return out


@pytest.mark.parametrize("t, window, softcap, scale", [
    (1, 10**6, None, None), (3, 4, 1.5, 0.3)])
@pytest.mark.parametrize("product", cached.PRODUCTS)
def test_equals_the_definition(product, t, window, softcap, scale):
  b, h, k, s, e = 3, 4, 2, 7, 8
  draw = lambda seed, *shape: np.asarray(
      jax.random.normal(jax.random.key(seed), shape), np.float64)
  q, own_k, own_v = (
      draw(i, b, t, n, e) for i, n in enumerate((h, k, k)))
  old = draw(3, b, k, s, e), draw(4, b, k, s, e)
  # A full row, one with free slots, and one that was empty.
  length = np.array([s, 4, 0])[:, None]
  old_at = np.broadcast_to(np.arange(s), (b, s))
  old_seen = (old_at < length).astype(np.int32)
  at = length + np.arange(t)
  seen = np.ones((b, t), np.int32)
  seen[1, 1:] = 0  # Padding, whose result means nothing.
  expected = by_hand(q, own_k, own_v, old, at, old_at, seen, old_seen, window,
                     scale or e ** -0.5, softcap)
  narrow = lambda *xs: [jnp.asarray(x, jnp.float32) for x in xs]
  got = attention.cached_attention(
      *narrow(q, own_k, own_v), tuple(narrow(*old)), at, old_at, seen,
      old_seen, window, scale=scale, softcap=softcap, product=product)
  assert bool(jnp.isfinite(got).all())
  real = seen.astype(bool)
  np.testing.assert_allclose(got[real], expected[real], rtol=2e-5, atol=2e-6)
