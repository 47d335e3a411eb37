"""Attention by its definition, in numpy float64, one query at a time."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.kernels.attention import base

# b, t, h, k, e of the tests' calls.
SHAPE = (3, 12, 4, 2, 8)
PACKED = ((3, 4, 5), (7, 2), ())  # Lengths of the segments of each row.
SINGLE = ((12,), (7,), ())


def attend(call: base.Call) -> np.ndarray:
  """`[b, t, h, e]`; zero where a query sees no key."""
  q, k, v = (np.asarray(x, np.float64) for x in (call.q, call.k, call.v))
  q_at, kv_at = np.asarray(call.q_positions), np.asarray(call.kv_positions)
  q_in, kv_in = np.asarray(call.q_segments), np.asarray(call.kv_segments)
  b, t, h, e = q.shape
  group = h // k.shape[2]
  scale = 1 / np.sqrt(e) if call.scale is None else call.scale
  out = np.zeros_like(q)
  for row in range(b):
    for i in range(t):
      if q_in[row, i] == 0:
        continue
      seen = [
          j for j in range(k.shape[1])
          if kv_in[row, j] == q_in[row, i] and kv_at[row, j] <= q_at[row, i]
          and (call.window is None
               or q_at[row, i] - kv_at[row, j] < int(call.window))]
      for head in range(h):
        logits = scale * k[row, seen, head // group] @ q[row, i, head]
        if call.softcap is not None:
          logits = call.softcap * np.tanh(logits / call.softcap)
        weights = np.exp(logits - logits.max())
        out[row, i, head] = (
            weights / weights.sum() @ v[row, seen, head // group])
  return out


def rows(lengths, t: int) -> tuple[np.ndarray, np.ndarray]:
  """Positions and segments `[b, t]` of rows of segments."""
  positions = np.zeros((len(lengths), t), np.int32)
  segments = np.zeros((len(lengths), t), np.int32)
  for row, parts in enumerate(lengths):
    at = 0
    for segment, n in enumerate(parts, 1):
      positions[row, at:at + n] = np.arange(n)
      segments[row, at:at + n] = segment
      at += n
  return positions, segments


def call(lengths=PACKED, seed: int = 0, layout: str = "packed",
         windows: tuple[int, ...] = (), dtype=jnp.float32, **fields
         ) -> base.Call:
  """A call over rows of segments, with normal queries, keys and values."""
  _, t, h, k, e = SHAPE
  b = len(lengths)
  keys = jax.random.split(jax.random.key(seed), 3)
  q, k, v = (jax.random.normal(key, (b, t, n, e)).astype(dtype)
             for key, n in zip(keys, (h, k, k)))
  positions, segments = map(jnp.asarray, rows(lengths, t))
  return base.Call(
      q, k, v, positions, positions, segments, segments,
      options=base.Options(layout=layout, windows=windows), **fields)


def replaced(call: base.Call, **fields) -> base.Call:
  return dataclasses.replace(call, **fields)
