"""Text from a model: batched, cached, streamed.

Prompts are padded on the right to a bucket and read at once; then every row
grows by one token a step. All sizes are buckets and everything else is
traced, so that two programs (prefill and decode) serve every request of a
bucket.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax import mesh as mesh_lib
from lora_jax import types
from lora_jax.evaluate import sampling as sampling_lib
from lora_jax.kernels import attention as attention_lib
from lora_jax.models import cache as cache_lib
from lora_jax.models import config as config_lib
from lora_jax.models import decoder

SMALLEST = 32  # Tokens of the smallest bucket.


def bucket(n: int, smallest: int = SMALLEST) -> int:
  """The smallest `smallest * 2^j` of at least n."""
  size = smallest
  while size < n:
    size *= 2
  return size


def _next(model, base, adapters, hidden, cache, key, rows, how):
  """(cache, tokens [b]) from the last hidden state `[b, d]` of each row."""
  logits = decoder.unembed(model, base, adapters, hidden)
  return cache, sampling_lib.draw(key, logits, rows, cache.length, how)


@functools.partial(
    jax.jit, static_argnames=("model", "size", "dtype", "attention"))
def prefill(
    base: types.Tree,
    adapters: types.Tree,
    tokens: types.Array,
    lengths: types.Array,
    key: jax.Array,
    rows: types.Array,
    how: sampling_lib.Sampling,
    *,
    model: config_lib.ModelConfig,
    size: int,
    dtype: str,
    attention: attention_lib.Options = attention_lib.Options(),
) -> tuple[cache_lib.Cache, jax.Array]:
  """Reads the prompts; gives the cache and each row's first new token.

  Args:
    base: the frozen base.
    adapters: beside it, or None.
    tokens: `[b, t]` int32, padded on the right.
    lengths: `[b]` int32; 0 for rows that only fill up the batch.
    key: PRNG key of the request.
    rows: `[b]` int32, see `sampling.draw`.
    how: traced parameters.
    model: static.
    size: s, slots of the cache; static.
    dtype: of activations and cache; static.
    attention: what computes attention; static. The layout is known here.

  Returns:
    The cache and `[b]` int32.
  """
  b, t = tokens.shape
  positions = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (b, t))
  segments = (positions < lengths[:, None]).astype(jnp.int32)
  cache = cache_lib.init_cache(model, b, size, dtype)
  hidden, filled = decoder.forward(
      model, base, adapters, tokens, positions, segments, cache=cache,
      dtype=dtype,
      attention=dataclasses.replace(attention, layout="single"))
  last = hidden[jnp.arange(b), jnp.maximum(lengths - 1, 0)]
  return _next(model, base, adapters, last, filled, key, rows, how)


@functools.partial(
    jax.jit, static_argnames=("model", "dtype"), donate_argnames="cache")
def decode(
    base: types.Tree,
    adapters: types.Tree,
    cache: cache_lib.Cache,
    tokens: types.Array,
    active: types.Array,
    key: jax.Array,
    rows: types.Array,
    how: sampling_lib.Sampling,
    *,
    model: config_lib.ModelConfig,
    dtype: str,
) -> tuple[cache_lib.Cache, jax.Array]:
  """One token further; see `prefill`.

  Args:
    base, adapters, key, rows, how, model, dtype: as there.
    cache: donated.
    tokens: `[b]` int32, the newest token of each row.
    active: `[b]` bool; other rows leave the cache as it is.

  Returns:
    The cache and each row's next token, `[b]` int32.
  """
  segments = active.astype(jnp.int32)[:, None]
  hidden, filled = decoder.forward(
      model, base, adapters, tokens[:, None], cache.length[:, None], segments,
      cache=cache, dtype=dtype)
  return _next(model, base, adapters, hidden[:, 0], filled, key, rows, how)


def generate(
    model: config_lib.ModelConfig,
    base: types.Tree,
    adapters: types.Tree,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop_ids: Iterable[int] = (),
    seed: int = 0,
    rows: Sequence[int] | None = None,
    dtype: Any = "float32",
    mesh: Mesh | None = None,
    attention: attention_lib.Options = attention_lib.Options(),
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
  """Continues every prompt.

  A row's tokens depend on its prompt, the seed and its number in `rows`, not
  on the rows beside it (but for rounding).

  Args:
    model: the architecture.
    base: the frozen base.
    adapters: beside it, or None.
    prompts: token ids, one list a row, of any lengths.
    max_new_tokens: at most this many a row; fewer where the model's
      `max_position` or a stop token ends it.
    temperature: 0 is greedy.
    top_k: 0 is all tokens.
    top_p: 1 is all tokens.
    stop_ids: tokens that end a row; they are not part of the result.
    seed: of the request.
    rows: number of each row in the request, for those who cut a request into
      batches; 0, 1, ... by default.
    dtype: of activations and cache.
    mesh: the devices that the trees are spread over, or None for one. Rows
      are cut along its data axis; weights are not gathered for single tokens,
      it is their products that are summed.
    attention: what computes attention over the prompts; single tokens read
      the cache on the plain path, as there is nothing to tile.
    on_token: called with (index into `prompts`, token) as tokens appear.

  Returns:
    The new tokens of each row.

  Raises:
    errors.UserError: for an empty or over-long prompt, or a token that the
      model does not have.
    errors.UsageError: for a sampling parameter out of range.
  """
  how = sampling_lib.sampling(temperature, top_k, top_p)
  if max_new_tokens < 1:
    raise errors.UsageError(
        f"max_new_tokens={max_new_tokens} is out of range; use 1 or more")
  if not prompts:
    return []
  _check(model, prompts)
  dtype = jnp.dtype(dtype).name
  n, b = len(prompts), bucket(len(prompts), 1)
  lengths = np.zeros(b, np.int32)
  lengths[:n] = [len(p) for p in prompts]
  tokens = np.zeros((b, bucket(int(lengths.max()))), np.int32)
  for row, prompt in zip(tokens, prompts):
    row[:len(prompt)] = prompt
  limits = np.minimum(max_new_tokens, model.max_position - lengths[:n])
  numbers = np.zeros(b, np.int32)
  numbers[:n] = np.arange(n) if rows is None else rows
  size = bucket(int((lengths[:n] + limits).max()))
  key, stops = jax.random.key(seed), frozenset(stop_ids)
  if adapters is not None:
    adapters = adapters_lib.prepared(adapters, base)

  place: Callable = lambda x: x if mesh is None else mesh_lib.put(
      mesh, x, ("requests",) + (None,) * (x.ndim - 1))
  active = np.arange(b) < n
  results: list[list[int]] = [[] for _ in prompts]
  cache, newest = prefill(
      base, adapters, place(tokens), place(lengths), key, place(numbers), how,
      model=model, size=size, dtype=dtype, attention=attention)
  while True:
    for i, token in enumerate(mesh_lib.fetch(newest)[:n].tolist()):
      if not active[i]:
        continue
      if token in stops:
        active[i] = False
        continue
      results[i].append(token)
      active[i] = len(results[i]) < limits[i]
      if on_token is not None:
        on_token(i, token)
    if not active.any():
      return results
    # A copy: the device may still read it when the next tokens come in.
    cache, newest = decode(
        base, adapters, cache, newest, place(active.copy()), key,
        place(numbers), how, model=model, dtype=dtype)


def _check(model, prompts) -> None:
  for i, prompt in enumerate(prompts):
    if not len(prompt):
      raise errors.UserError(
          f"prompt {i} has no token; give at least one, such as the BOS token")
    if len(prompt) >= model.max_position:
      raise errors.UserError(
          f"prompt {i} has {len(prompt)} tokens, and the model's context "
          f"(max_position) is {model.max_position}; shorten it")
    bad = [t for t in prompt if not 0 <= t < model.vocab_size]
    if bad:
      raise errors.UserError(
          f"prompt {i} holds token {bad[0]}, but the model has tokens 0 to "
          f"{model.vocab_size - 1}; use the model's own tokenizer")


class Streamer:
  """Text of one row as its tokens come; never half a character.

  A character may span tokens, and a token's text may depend on the one
  before it. Text is held back while it ends in an incomplete UTF-8 sequence;
  all that is given, joined, is the tokenizer's own decoding of the row.
  """

  def __init__(self, tokenizer: Any, skip_special_tokens: bool = True):
    self._tokenizer, self._skip = tokenizer, skip_special_tokens
    self._ids: list[int] = []
    # Ids from `_first` to `_given` are decoded again, as context.
    self._first = self._given = 0

  def put(self, token: int) -> str:
    """The text that this token completes, perhaps none."""
    self._ids.append(token)
    before = self._text(self._first, self._given)
    text = self._text(self._first, len(self._ids))
    if len(text) <= len(before) or text.endswith("\ufffd"):
      return ""
    self._first, self._given = self._given, len(self._ids)
    return text[len(before):]

  def end(self) -> str:
    """What was held back; replacement characters if it is incomplete."""
    before = self._text(self._first, self._given)
    text = self._text(self._first, len(self._ids))
    self._first = self._given = len(self._ids)
    return text[len(before):]

  def _text(self, first, past):
    return self._tokenizer.decode(
        self._ids[first:past], skip_special_tokens=self._skip,
        clean_up_tokenization_spaces=False)
