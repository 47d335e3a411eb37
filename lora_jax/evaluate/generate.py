"""Text from a model: batched, cached, streamed.

Prompts are padded on the right to a bucket and read at once; then every row
grows by one token a step, in a loop on the device (`decoding`). The host only
collects what the loop has given, while the device goes on with the next
chunk. All sizes are buckets and everything else is traced: one program reads
the prompts of a bucket, and one draws tokens for each size of the cache, which
doubles as it fills, so that no step reads more than twice what is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax import mesh as mesh_lib
from lora_jax import types
from lora_jax.data import virtual
from lora_jax.evaluate import decoding
from lora_jax.evaluate import sampling as sampling_lib
from lora_jax.kernels import attention as attention_lib
from lora_jax.models import config as config_lib

SMALLEST = 32  # Tokens of the smallest bucket of prompts.
SLOTS = 128  # Of the smallest cache.
STOPS = 8  # Tokens that may end a row without another program.


def bucket(n: int, smallest: int = SMALLEST) -> int:
  """The smallest `smallest * 2^j` of at least n."""
  size = smallest
  while size < n:
    size *= 2
  return size


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
    tasks: Sequence[int] | None = None,
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
    tasks: of each prompt, for adapters with virtual tokens of several; all 0
      by default.
    dtype: of activations and cache.
    mesh: the devices that the trees are spread over, or None for one. Rows
      are cut along its data axis; weights are not gathered for single tokens,
      it is their products that are summed.
    attention: what computes attention over the prompts; single tokens read
      the cache on a path of their own, as there is nothing to tile.
    on_token: called with (index into `prompts`, token) as tokens appear,
      which are then fetched one by one, not by chunks.

  Returns:
    The new tokens of each row.

  Raises:
    errors.UserError: for an empty or over-long prompt, or a token that the
      model does not have.
    errors.UsageError: for a sampling parameter or a task out of range.
  """
  how = sampling_lib.sampling(temperature, top_k, top_p)
  if max_new_tokens < 1:
    raise errors.UsageError(
        f"max_new_tokens={max_new_tokens} is out of range; use 1 or more")
  if not prompts:
    return []
  _check(model, prompts)
  ahead = adapters_lib.virtual_tokens(adapters)
  tasks = _tasks(tasks, len(prompts), adapters_lib.virtual_tasks(adapters))
  prompts = [virtual.ids(ahead, task).tolist() + list(prompt)
             for task, prompt in zip(tasks, prompts, strict=True)]
  dtype = jnp.dtype(dtype).name
  base, adapters = decoding.prepared(
      base, adapters, dtype, mesh, model.layer_order)
  n, b = len(prompts), bucket(len(prompts), 1)
  lengths, limits, numbers = np.zeros((3, b), np.int32)
  lengths[:n] = [len(p) for p in prompts]
  limits[:n] = np.minimum(max_new_tokens, model.max_position - lengths[:n])
  numbers[:n] = np.arange(n) if rows is None else rows
  tokens = np.zeros((b, bucket(int(lengths.max()))), np.int32)
  for row, prompt in zip(tokens, prompts):
    row[:len(prompt)] = prompt
  ids = sorted(set(stop_ids))
  stops = np.full(bucket(len(ids), STOPS), decoding.NONE, np.int32)
  stops[:len(ids)] = ids

  place: Callable = lambda x: x if mesh is None else mesh_lib.put(
      mesh, x, ("requests",) + (None,) * (x.ndim - 1))
  request = decoding.Request(
      key=jax.random.key(seed), rows=place(numbers), stops=stops, how=how)
  size = bucket(int(lengths.max()) + decoding.CHUNK, SLOTS)
  state, given = decoding.prefill(
      base, adapters, place(tokens), place(lengths), place(limits),
      np.int32(bucket(int((lengths + limits).max()))), request,
      model=model, size=size, dtype=dtype, attention=attention, mesh=mesh)
  results: list[list[int]] = [[] for _ in prompts]
  pending, asked, alive = given[:, None], 1, np.arange(b) < n
  while alive.any():
    # The next tokens are asked for before these are looked at, so that the
    # device does not wait; if these end every row, its loop ends at once.
    further = None
    steps = min(1 if on_token else decoding.CHUNK,
                int(limits[alive].max()) - asked)
    if steps > 0:
      slots = int(lengths[alive].max()) + asked - 1 + steps
      if slots > size:
        size = bucket(slots, SLOTS)
        state = decoding.grown(state, size)
      state, further = decoding.decode(
          base, adapters, state, request, np.int32(steps), model=model,
          dtype=dtype, mesh=mesh)
    for column in mesh_lib.fetch(pending)[:n].T.tolist():
      for i, token in enumerate(column):
        if token == decoding.NONE:
          continue
        results[i].append(token)
        if on_token is not None:
          on_token(i, token)
    # A row that goes on has had a token of every step.
    alive[:n] = [len(r) == asked < limit
                 for r, limit in zip(results, limits.tolist())]
    pending, asked = further, asked + steps
  return results


def _tasks(given, n, known) -> list[int]:
  """The task of each of n prompts."""
  tasks = [0] * n if given is None else list(given)
  if len(tasks) != n or not all(0 <= task < known for task in tasks):
    raise errors.UsageError(
        f"tasks={tasks} are not one for each of {n} prompts, from 0 to "
        f"{known - 1}; correct them, or leave them out")
  return tasks


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
