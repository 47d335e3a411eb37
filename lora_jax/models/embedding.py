"""From tokens to the first hidden states."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import adapters as adapters_lib
from lora_jax import types


def embed(
    table: types.Array,
    adapters: adapters_lib.Adapters,
    tokens: types.Array,
    dtype: Any,
    scale: float | None = None,
    noise: adapters_lib.Noise | None = None,
    segment_ids: types.Array | None = None,
) -> types.Array:
  """Embeddings of tokens, `[b, t, d]` in `dtype`.

  Args:
    table: `[v, d]`.
    adapters: those of the table, and virtual tokens.
    tokens: `[b, t]` int; virtual ones are -1, -2, ...
    dtype: of the activations.
    scale: what they are multiplied by, if the model does so.
    noise: a training step's; adds NEFTune's if that was asked.
    segment_ids: `[b, t]` int, 0 on padding; for `noise`.
  """
  adapter = adapters_lib.module(adapters, "embed_tokens", None)
  prompt = adapters_lib.module(adapters, "prompt", None)
  known = tokens if prompt is None else jnp.maximum(tokens, 0)
  if adapter is not None:
    found = adapter.lookup(known, table).astype(dtype)
  else:
    # Rows first: casting the table would cost a second one.
    found = jnp.take(table, known, axis=0).astype(dtype)
  if noise is not None and noise.neftune:
    assert segment_ids is not None
    found = found + neftune(found, noise, segment_ids).astype(dtype)
  if scale is not None:
    # transformers rounds it too: 55.5 for sqrt(3072) in bfloat16.
    found = found * jnp.asarray(scale, dtype)
  if prompt is None:
    return found
  # Virtual tokens are numbered -1, -2, ..., and not scaled.
  rows = jnp.take(prompt.virtual(), jnp.maximum(-1 - tokens, 0), axis=0)
  return jnp.where((tokens < 0)[..., None], rows.astype(dtype), found)


def neftune(
    x: types.Array, noise: adapters_lib.Noise, segment_ids: types.Array
) -> types.Array:
  """NEFTune's noise (arXiv 2310.05914, algorithm 1), `[b, t, d]` float32:

    U(-1, 1) alpha / sqrt(L d)

  L is the length of a token's own example, wherever it was packed;
  transformers takes that of the padded batch.

  Args:
    x: embeddings `[b, t, d]`.
    noise: with `neftune`, the alpha.
    segment_ids: `[b, t]` int.
  """
  t, d = x.shape[1:]
  lengths = jax.vmap(
      lambda s: jnp.zeros(t + 1, jnp.int32).at[s].add(1)[s])(segment_ids)
  size = noise.neftune / jnp.sqrt(lengths.astype(jnp.float32) * d)
  return size[..., None] * noise.for_target("embed_tokens").uniform(x)
