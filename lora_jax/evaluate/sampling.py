"""The next token from logits: greedy, temperature, top-k, nucleus.

All parameters are traced: a study over them compiles nothing again.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lora_jax import errors
from lora_jax import struct
from lora_jax import types


@struct.dataclass
class Sampling:
  """How a token is drawn; scalars.

  Attributes:
    temperature: 0 is greedy.
    top_k: only the k likeliest tokens; 0 is all of them.
    top_p: only the smallest set of likeliest tokens with at least this
      probability (Holtzman et al. 2020, 1904.09751, section 3.1).
  """

  temperature: types.Array
  top_k: types.Array
  top_p: types.Array


def sampling(
    temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0
) -> Sampling:
  """Checks the three values.

  Raises:
    errors.UsageError: if one is out of range.
  """
  if not 0 <= temperature < float("inf"):
    raise errors.UsageError(
        f"temperature={temperature} is out of range; use 0 (greedy) or more")
  if top_k < 0:
    raise errors.UsageError(
        f"top_k={top_k} is out of range; use 0 (all tokens) or more")
  if not 0 < top_p <= 1:
    raise errors.UsageError(
        f"top_p={top_p} is out of range; use a share in (0, 1]")
  return Sampling(
      temperature=jnp.float32(temperature), top_k=jnp.int32(top_k),
      top_p=jnp.float32(top_p))


def filtered(logits: jax.Array, how: Sampling) -> jax.Array:
  """Logits over the temperature, -inf where top-k or top-p exclude a token.

  In transformers' order: temperature, top-k, and top-p over what top-k left.
  Tokens that tie with the last one kept are kept.

  Args:
    logits: `[..., v]` float32.
    how: with a positive temperature.

  Returns:
    `[..., v]` float32.
  """
  v = logits.shape[-1]
  logits = logits / how.temperature
  ordered = -jnp.sort(-logits, axis=-1)
  k = jnp.where(how.top_k > 0, jnp.minimum(how.top_k, v), v)
  ordered = jnp.where(jnp.arange(v) < k, ordered, -jnp.inf)
  p = jax.nn.softmax(ordered, axis=-1)
  # Kept while the likelier ones have not reached top_p; 1 keeps all, though
  # the sum of many floats may pass it.
  before = jnp.cumsum(p, axis=-1) - p
  kept = (ordered > -jnp.inf) & ((before < how.top_p) | (how.top_p >= 1))
  least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
  return jnp.where(logits >= least, logits, -jnp.inf)


def draw(
    key: jax.Array,
    logits: jax.Array,
    rows: jax.Array,
    positions: jax.Array,
    how: Sampling,
) -> jax.Array:
  """One token a row, drawn with fold_in(fold_in(key, row), position).

  Args:
    key: PRNG key of the request.
    logits: `[b, v]` float32.
    rows: `[b]` int32, what the request calls each row.
    positions: `[b]` int32, where each token will stand.
    how: traced parameters.

  Returns:
    `[b]` int32.
  """

  def sample(logits):
    def one(row, position, row_logits):
      row_key = jax.random.fold_in(jax.random.fold_in(key, row), position)
      return jax.random.categorical(row_key, row_logits)

    return jax.vmap(one)(
        rows, positions, filtered(logits, how)).astype(jnp.int32)

  def greedy(logits):
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)

  # Not a select: greedy decoding should not pay for a sort of the vocabulary.
  return jax.lax.cond(how.temperature > 0, sample, greedy, logits)
