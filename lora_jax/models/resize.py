"""More rows in the embedding and the head, for new tokens.

A new row is the mean of those that were there (in float32), as transformers'
`mean_resizing` does but for its noise, so that a new token is no surprise to
the layers and its logit is the mean logit. Nothing is drawn: the same base
gives the same rows.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from lora_jax import errors
from lora_jax import quant
from lora_jax.models import config as config_lib
from lora_jax.models import decoder


def grow(
    config: config_lib.ModelConfig, base: decoder.Base, tokens: int,
    multiple: int = 1
) -> tuple[config_lib.ModelConfig, decoder.Base]:
  """The model with room for `tokens` ids.

  Args:
    config: the architecture.
    base: its weights.
    tokens: the vocabulary's size; smaller than the model's adds nothing.
    multiple: the new size is a multiple of it. Rows that are no token's are
      like those of new ones; nothing masks their logits, as in transformers.

  Returns:
    (architecture, base), the same where nothing is added.

  Raises:
    errors.UsageError: for a bad multiple, or a quantised head.
  """
  if multiple < 1:
    raise errors.UsageError(
        f"model.pad_vocab_multiple={multiple} is out of range; use an integer "
        "of at least 1, such as 64")
  old = config.vocab_size
  size = -(-max(old, tokens) // multiple) * multiple
  if size == old:
    return config, base
  head = base.lm_head
  if head is not None:
    if isinstance(head.weight, quant.QuantizedArray):
      raise errors.UsageError(
          "model.add_tokens: the head is quantised, and has no room for rows; "
          "add lm_head to quant.skip")
    head = dataclasses.replace(
        head, weight=_append(head.weight, size - old, axis=1))
  return dataclasses.replace(config, vocab_size=size), dataclasses.replace(
      base, embed_tokens=_append(base.embed_tokens, size - old, axis=0),
      lm_head=head)


def _append(table: jax.Array, count: int, axis: int) -> jax.Array:
  mean = jnp.mean(table.astype(jnp.float32), axis, keepdims=True)
  rows = jnp.repeat(mean.astype(table.dtype), count, axis)
  return jnp.concatenate([table, rows], axis)
