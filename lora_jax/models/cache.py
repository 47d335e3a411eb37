"""Keys and values of the tokens a model has read: a static-size cache.

Every row appends at its own length, so right-padded prompts of unequal
length continue without gaps; what a slot holds is said by its position and
segment, and the mask rule of `attention.visible` needs nothing more.

A pass reads the cache layer by layer and never writes to it: the layers hand
their new keys and values on, and `append` puts all of them in at the end. It
is then one update in place, where a cache threaded through the scan over
layers would be copied whole for every token.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import struct
from lora_jax import types
from lora_jax.kernels import attention as attention_lib
from lora_jax.models import config as config_lib


@struct.dataclass
class Cache:
  """Attributes:

    k, v: `[l, b, k, s, e]`: a head's keys lie together, as products want.
    positions: `[b, s]` int32, of the token in each slot.
    segment_ids: `[b, s]` int32, 0 on empty slots.
    length: `[b]` int32, slots in use.
    capacity: `[]` int32, tokens that a row will hold at most; s unless the
      cache is to grow.
    first: of the same tokens in a first pass, which adapters that are `guided`
      have before their own, or in a decoder that reads them first (`beside`);
      None where there are none.
  """

  k: types.Array
  v: types.Array
  positions: types.Array
  segment_ids: types.Array
  length: types.Array
  capacity: types.Array
  first: Cache | None = None


def init_cache(
    config: config_lib.ModelConfig,
    b: int,
    s: int,
    dtype: Any = jnp.float32,
    capacity: types.Array | None = None,
    guided: bool = False,
    reader: config_lib.ModelConfig | None = None,
) -> Cache:
  """An empty cache for b rows of at most s tokens; more are not stored.

  Args:
    config: the model.
    b, s: rows and slots.
    dtype: of keys and values.
    capacity: see `Cache`.
    guided: whether there is a first pass, `adapters.is_guided`.
    reader: the decoder that reads first, `beside.model`, or None.
  """
  before = config if guided else reader
  shape = (config.n_layers, b, config.n_kv_heads, s, config.head_dim)
  return Cache(
      k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype),
      positions=jnp.zeros((b, s), jnp.int32),
      segment_ids=jnp.zeros((b, s), jnp.int32),
      length=jnp.zeros((b,), jnp.int32),
      capacity=jnp.asarray(s if capacity is None else capacity, jnp.int32),
      first=None if before is None else init_cache(
          before, b, s, dtype, capacity))


def first(cache: Cache | None) -> Cache | None:
  """The first pass's cache; None without one of the second.

  Raises:
    ValueError: if it is missing, without which tokens were read otherwise.
  """
  if cache is not None and cache.first is None:
    raise ValueError(
        "these adapters have a first pass: make the cache with guided=True, "
        "or with reader=beside.model(...)")
  return cache and cache.first


@functools.partial(jax.jit, static_argnames="s")
def grown(cache: Cache, s: int) -> Cache:
  """The same tokens in a cache of s slots, which are no fewer."""
  more = s - cache.positions.shape[1]

  def pad(x, axis):
    widths = [(0, more if i == axis % x.ndim else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths)

  return dataclasses.replace(
      cache, k=pad(cache.k, -2), v=pad(cache.v, -2),
      positions=pad(cache.positions, 1),
      segment_ids=pad(cache.segment_ids, 1),
      first=cache.first and grown(cache.first, s))


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


def append(
    cache: Cache,
    new: tuple[types.Array, types.Array],
    positions: types.Array,
    segment_ids: types.Array,
) -> Cache:
  """The cache with tokens put in, of all layers at once.

  Args:
    cache: before these tokens.
    new: keys and values `[l, b, t, k, e]`.
    positions, segment_ids: see `extend`.
  """
  extended, slots = extend(cache, positions, segment_ids)
  # One scatter with an index for every head of every layer. Were layers and
  # heads a part of what an index stands for, XLA on GPU would put the indexed
  # axes first: the whole cache would be transposed, and transposed back.
  slots = jnp.broadcast_to(
      slots[None, :, None], (*cache.k.shape[:3], slots.shape[1]))

  def head(into, values, slots):
    return into.at[slots].set(values, mode="drop", unique_indices=True)

  put = jax.vmap(jax.vmap(jax.vmap(head)))
  k, v = (put(into, values.astype(into.dtype).swapaxes(2, 3), slots)
          for into, values in zip((cache.k, cache.v), new, strict=True))
  return dataclasses.replace(extended, k=k, v=v)


def opened(
    new: tuple[types.Array, types.Array], s: int, dtype: Any
) -> tuple[types.Array, types.Array]:
  """One layer's `[b, k, s, e]` of an empty cache with rows' first tokens.

  Stacked over the layers this is the cache: it exists once.

  Args:
    new: keys and values `[b, t, k, e]` of rows that begin with a segment;
      what padding leaves in later slots is never seen.
    s: slots, at least t.
    dtype: of the cache.
  """

  def one(values):
    values = values.astype(dtype).swapaxes(1, 2)
    return jnp.pad(
        values, ((0, 0), (0, 0), (0, s - values.shape[2]), (0, 0)))

  return one(new[0]), one(new[1])


def with_prefix(
    ahead: tuple[types.Array, types.Array, types.Array],
    cached: tuple[types.Array, types.Array] | None,
    where: tuple,
    k: types.Array,
) -> tuple:
  """(keys and values before the queries' own, where all are), with a prefix.

  Args:
    ahead: keys and values `[n, k, e]`, at positions -n ... -1, and whether
      they are seen.
    cached: `[b, k, s, e]` of earlier tokens, or None.
    where: positions and segments of queries and of cached keys; the window.
    k: the tokens' own keys `[b, t, k, e]`.
  """
  q_positions, kv_positions, q_segments, kv_segments, window = where
  b, n = k.shape[0], ahead[0].shape[0]
  pair = tuple(
      jnp.broadcast_to(x.astype(k.dtype).swapaxes(0, 1)[None],
                       (b, k.shape[2], n, k.shape[3])) for x in ahead[:2])
  positions = jnp.broadcast_to(jnp.arange(-n, 0, dtype=jnp.int32), (b, n))
  segments = jnp.broadcast_to(
      jnp.where(ahead[2], attention_lib.EVERY, 0), (b, n)).astype(jnp.int32)
  if cached is None:
    return pair, (q_positions, positions, q_segments, segments, window)
  return tuple(
      jnp.concatenate([x, old.astype(x.dtype)], 2)
      for x, old in zip(pair, cached, strict=True)), (
          q_positions, jnp.concatenate([positions, kv_positions], 1),
          q_segments, jnp.concatenate([segments, kv_segments], 1), window)


def _put(into, values, slots):
  rows = jnp.arange(slots.shape[0])[:, None]
  return into.at[rows, slots].set(
      values.astype(into.dtype), mode="drop", unique_indices=True)
