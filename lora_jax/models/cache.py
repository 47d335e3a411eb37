"""Keys and values of the tokens a model has read: a static-size cache.

Every row appends at its own length, so right-padded prompts of unequal
length continue without gaps; what a slot holds is said by its position and
segment, and the mask rule of `attention.visible` needs nothing more.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from lora_jax import struct
from lora_jax import types
from lora_jax.models import config as config_lib


@struct.dataclass
class Cache:
  """Attributes:

    k, v: `[l, b, s, k, e]`.
    positions: `[b, s]` int32, of the token in each slot.
    segment_ids: `[b, s]` int32, 0 on empty slots.
    length: `[b]` int32, slots in use.
  """

  k: types.Array
  v: types.Array
  positions: types.Array
  segment_ids: types.Array
  length: types.Array


def init_cache(
    config: config_lib.ModelConfig, b: int, s: int, dtype: Any = jnp.float32
) -> Cache:
  """An empty cache for b rows of at most s tokens; more are not stored."""
  shape = (config.n_layers, b, s, config.n_kv_heads, config.head_dim)
  return Cache(
      k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype),
      positions=jnp.zeros((b, s), jnp.int32),
      segment_ids=jnp.zeros((b, s), jnp.int32),
      length=jnp.zeros((b,), jnp.int32))


def extend(
    cache: Cache, positions: types.Array, segment_ids: types.Array
) -> tuple[Cache, types.Array]:
  """Reserves a slot for every token that is not padding.

  Args:
    cache: before these tokens.
    positions: `[b, t]` int.
    segment_ids: `[b, t]` int, 0 on padding.

  Returns:
    The cache with positions, segments and length extended (keys and values
    as before), and the slots `[b, t]` int32; padding's slot is s, beyond the
    end, where writes are dropped.
  """
  real = segment_ids != 0
  order = jnp.cumsum(real.astype(jnp.int32), axis=1)
  slots = jnp.where(
      real, cache.length[:, None] + order - 1, cache.positions.shape[1])
  extended = dataclasses.replace(
      cache,
      positions=_put(cache.positions, positions, slots),
      segment_ids=_put(cache.segment_ids, segment_ids, slots),
      length=cache.length + order[:, -1])
  return extended, slots


def write(
    cached: tuple[types.Array, types.Array],
    new: tuple[types.Array, types.Array],
    slots: types.Array,
) -> tuple[types.Array, types.Array]:
  """One layer's keys and values `[b, s, k, e]` with `[b, t, k, e]` put in."""
  return _put(cached[0], new[0], slots), _put(cached[1], new[1], slots)


def _put(into, values, slots):
  rows = jnp.arange(slots.shape[0])[:, None]
  return into.at[rows, slots].set(values.astype(into.dtype), mode="drop")
