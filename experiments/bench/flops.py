"""How many operations a step needs, whatever it executes.

A token takes, forward and backward,

  4 N + 3 A   beside a frozen base (LoRA and its relatives)
  6 N + 3 A   if the weights are trained too

N  parameters of the projections and of the head (a lookup in the embedding
   table is no product; adapters, norms and biases do not count). A product
   with them takes 2 N forward and 2 N for the gradient of its input; the
   gradient of the weight, another 2 N, is not needed where it is frozen.
A  operations of causal attention forward, a token: q k^T and p v, of half of
   the square of the segment's length n, which is 2 h e n in every layer.
   Backward takes twice as much.

What is computed twice (rematerialisation) and the upper half of the square
are no useful work. The peers' tables count 4 N alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_jax.models import config as config_lib
from lora_jax.models import hf


def matmul_parameters(config: config_lib.ModelConfig) -> int:
  """N: elements of all projections and of the head, tied or not."""
  layers = sum(
      slot.shape[0] * slot.shape[1] for slot in hf.slots(config)
      if slot.linear and slot.stacked)
  return config.n_layers * layers + config.d_model * config.vocab_size


def attention(config: config_lib.ModelConfig, lengths: Sequence[int]) -> float:
  """A: operations a token, of segments of the given lengths.

  In a layer with a window w only the keys within it count: w n - w^2 / 2
  pairs of n^2 / 2.
  """
  windows = config.windows() or (max(lengths),) * config.n_layers
  pairs = 0.0
  for window in windows:
    for n in lengths:
      w = min(window, n)
      pairs += w * n - w * w / 2
  # Two products of e multiplications and additions a pair and head.
  return 4 * config.n_heads * config.head_dim * pairs / sum(lengths)


def train_token(
    config: config_lib.ModelConfig,
    lengths: Sequence[int],
    weights_trained: bool = False,
) -> float:
  """Operations a token of a training step.

  Args:
    config: the model.
    lengths: of the segments, in tokens; together they are the batch.
    weights_trained: whether the base's weights get gradients.

  Returns:
    4 N + 3 A, or 6 N + 3 A.
  """
  products = 6 if weights_trained else 4
  return products * matmul_parameters(config) + 3 * attention(config, lengths)
