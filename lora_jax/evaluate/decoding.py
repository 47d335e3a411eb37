"""The programs of generation: read the prompts, then draw tokens in a loop.

The loop is on the device, as are the tests that end it: tokens of a whole
chunk cost the host one call. What varies between requests of a bucket is
traced: the sampling parameters, the stop tokens, every row's limit, and how
many tokens a chunk has.

  prefill  tokens [b, t], an empty cache of s slots  ->  state, tokens [b]
  decode   state  ->  state, tokens [b, CHUNK]
  grown    state  ->  the same with a larger cache
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lora_jax import adapters as adapters_lib
from lora_jax import host as host_lib
from lora_jax import quant
from lora_jax import struct
from lora_jax import types
from lora_jax.evaluate import sampling as sampling_lib
from lora_jax.kernels import attention as attention_lib
from lora_jax.models import beside
from lora_jax.models import cache as cache_lib
from lora_jax.models import config as config_lib
from lora_jax.models import decoder
from lora_jax.models import sharding

CHUNK = 32  # Tokens a row of one call of `decode`, at most.
NONE = -1  # Where a row that has ended has no token.


@struct.dataclass
class Request:
  """What stays the same from token to token.

  Attributes:
    key: PRNG key of the request.
    rows: `[b]` int32, see `sampling.draw`.
    stops: `[n]` int32, tokens that end a row; negative ones are none.
    how: traced parameters of the sampling.
  """

  key: jax.Array
  rows: types.Array
  stops: types.Array
  how: sampling_lib.Sampling


@struct.dataclass
class State:
  """What a token hands on to the next.

  Attributes:
    cache: all tokens but the newest.
    newest: `[b]` int32.
    active: `[b]` bool, rows that go on.
    left: `[b]` int32, tokens that each row may still have.
  """

  cache: cache_lib.Cache
  newest: types.Array
  active: types.Array
  left: types.Array


def prepared(
    base: decoder.Base,
    adapters: adapters_lib.Adapters | None,
    dtype: str,
    mesh: Mesh | None = None,
    order: tuple[int, ...] = (),
) -> tuple[decoder.Base, adapters_lib.Adapters | None]:
  """Both trees with what every token would compute anew computed once.

  That is doubly quantised statistics, DoRA's norms, and roundings to `dtype`.
  What is prepared already comes back as it is: a server that answers many
  requests with the same weights prepares them once, and `generate` finds
  nothing to do.

  Args:
    base: the frozen base.
    adapters: beside it, or None.
    dtype: of the activations.
    mesh: the devices they are spread over, or None for one.
    order: the model's `layer_order`.

  Returns:
    Trees that compute the same. Codes are shared with `base`; statistics in
    blocks of 64 take 0.5 bits a weight where nested ones take 0.127.
  """

  def stored(weight):
    if isinstance(weight, quant.QuantizedArray) or host_lib.in_host(weight):
      return weight
    wide = weight.ndim > 1 and weight.dtype.itemsize > jnp.dtype(dtype).itemsize
    return jnp.asarray(weight, dtype) if wide else weight

  def computed(weight):
    # What is in the host's memory is only copied, the less the better.
    if isinstance(weight, quant.QuantizedArray) and not any(
        map(host_lib.in_host, jax.tree.leaves(weight))):
      return weight.unnested()
    return weight

  base = decoder.combined(base, adapters)
  unnested = jax.tree.map(
      computed, base, is_leaf=lambda w: isinstance(w, quant.QuantizedArray))
  if adapters is not None:
    adapters = adapters_lib.prepared(
        dataclasses.replace(adapters, overrides=None), unnested, dtype, order)
  found = jax.tree.map(
      stored, unnested, is_leaf=lambda w: isinstance(w, quant.QuantizedArray))
  if adapters is not None and "embed_tokens" in adapters.outer:
    # The table and the adapter's rows are added before they are rounded.
    found = dataclasses.replace(found, embed_tokens=unnested.embed_tokens)
  return found if mesh is None else sharding.put(mesh, found), adapters


def _drawn(model, base, adapters, hidden, cache, request):
  """`[b]` tokens from the last hidden state `[b, d]` of each row."""
  logits = decoder.unembed(model, base, adapters, hidden)
  return sampling_lib.draw(
      request.key, logits, request.rows, cache.length, request.how)


def _settled(cache, newest, active, left, request):
  """(state, `[b]` tokens or NONE) after a token was drawn for every row."""
  stopped = (newest[:, None] == request.stops).any(1)
  given = active & ~stopped
  left = left - given.astype(left.dtype)
  state = State(cache=cache, newest=newest, active=given & (left > 0),
                left=left)
  return state, jnp.where(given, newest, NONE)


@functools.partial(jax.jit, static_argnames=(
    "model", "size", "dtype", "attention", "mesh"))
def prefill(
    base: types.Tree,
    adapters: types.Tree,
    tokens: types.Array,
    lengths: types.Array,
    limits: types.Array,
    capacity: types.Array,
    request: Request,
    *,
    model: config_lib.ModelConfig,
    size: int,
    dtype: str,
    attention: attention_lib.Options = attention_lib.Options(),
    mesh: Mesh | None = None,
) -> tuple[State, jax.Array]:
  """Reads the prompts, and draws each row's first token.

  Args:
    base: the frozen base.
    adapters: beside it, or None.
    tokens: `[b, t]` int32, padded on the right.
    lengths: `[b]` int32.
    limits: `[b]` int32, tokens that each row may have; 0 for rows that only
      fill up the batch.
    capacity: `[]` int32, see `cache.Cache`.
    request: of these rows.
    model: static.
    size: s, slots of the cache, at least t; static.
    dtype: of activations and cache; static.
    attention: what computes attention; static. The layout is known here.
    mesh: static; the devices, or None for one.

  Returns:
    The state and `[b]` int32, NONE where a row has ended at once.
  """
  b, t = tokens.shape
  positions = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (b, t))
  segments = (positions < lengths[:, None]).astype(jnp.int32)
  guided = adapters is not None and adapters_lib.is_guided(adapters)
  cache = cache_lib.init_cache(
      model, b, size, dtype, capacity, guided, beside.model(model, adapters))
  hidden, filled = decoder.forward(
      model, base, adapters, tokens, positions, segments, cache=cache,
      dtype=dtype,
      attention=dataclasses.replace(attention, layout="single"))
  last = hidden[jnp.arange(b), jnp.maximum(lengths - 1, 0)]
  newest = _drawn(model, base, adapters, last, filled, request)
  state, given = _settled(filled, newest, limits > 0, limits, request)
  return state, sharding.rows(mesh, given, None)


@functools.partial(
    jax.jit, static_argnames=("model", "dtype", "mesh"),
    donate_argnames="state")
def decode(
    base: types.Tree,
    adapters: types.Tree,
    state: State,
    request: Request,
    steps: types.Array,
    *,
    model: config_lib.ModelConfig,
    dtype: str,
    mesh: Mesh | None = None,
) -> tuple[State, jax.Array]:
  """Further tokens, until `steps` are drawn or every row has ended.

  Args:
    base, adapters, request, model, dtype, mesh: see `prefill`.
    state: donated; its cache is written in place, and has as many free slots.
    steps: `[]` int32, at most CHUNK.

  Returns:
    The state and `[b, CHUNK]` int32, NONE after a row's end and `steps`.
  """

  def going(carry):
    step, state, _ = carry
    return (step < steps) & state.active.any()

  def token(carry):
    step, state, given = carry
    segments = state.active.astype(jnp.int32)[:, None]
    hidden, cache = decoder.forward(
        model, base, adapters, state.newest[:, None],
        state.cache.length[:, None], segments, cache=state.cache, dtype=dtype)
    newest = _drawn(model, base, adapters, hidden[:, 0], cache, request)
    state, tokens = _settled(
        cache, newest, state.active, state.left, request)
    return step + 1, state, given.at[:, step].set(tokens)

  nothing = jnp.full((state.newest.shape[0], CHUNK), NONE, jnp.int32)
  _, state, given = jax.lax.while_loop(
      going, token, (jnp.int32(0), state, nothing))
  return state, sharding.rows(mesh, given, None, None)


def grown(state: State, size: int) -> State:
  """The same state with a cache of `size` slots."""
  return dataclasses.replace(state, cache=cache_lib.grown(state.cache, size))
