"""Noise on embeddings: its size and its independence of packing."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import adapters as adapters_lib
from lora_jax.models import decoder
from lora_jax.models import embedding
from lora_jax.models import init
from tests import tiny

CONFIG = tiny.CONFIGS["llama"]
ALPHA = 5.0
# Examples 7 and 9 in one row, then padding; 9 alone; both have other lengths.
SEGMENTS = jnp.array([[1] * 4 + [2] * 9 + [0] * 3, [1] * 9 + [0] * 7])
EXAMPLES = jnp.array([[7] * 4 + [9] * 9 + [0] * 3, [9] * 9 + [0] * 7])
POSITIONS = jnp.array([[*range(4), *range(9), 0, 0, 0],
                       [*range(9), *[0] * 7]])


def noise(step=0, alpha=ALPHA):
  key = jax.random.fold_in(jax.random.key(0), step)
  return adapters_lib.Noise(key, EXAMPLES, POSITIONS, alpha)


def test_noise_has_the_papers_size():
  d = 4096
  found = np.asarray(embedding.neftune(
      jnp.zeros((2, 16, d)), noise(), SEGMENTS))
  for row, columns, length in ((0, slice(0, 4), 4), (0, slice(4, 13), 9)):
    part, most = found[row, columns], ALPHA / np.sqrt(length * d)
    assert np.abs(part).max() <= most
    # Of U(-1, 1): the mean is 0, the variance 1/3.
    assert abs(part.mean()) < 0.02 * most
    np.testing.assert_allclose(part.std(), most / np.sqrt(3), rtol=0.02)


def test_noise_is_an_examples_own_wherever_it_is_packed():
  x = jnp.zeros((2, 16, 8))
  found = embedding.neftune(x, noise(), SEGMENTS)
  np.testing.assert_array_equal(found[0, 4:13], found[1, :9])
  assert (found[0, :4] != found[0, 4:8]).all()
  other = embedding.neftune(x, noise(step=1), SEGMENTS)
  assert (found[0, :13] != other[0, :13]).all()


def test_a_step_adds_it_and_nothing_else_does():
  base = init.random_base(jax.random.key(0), CONFIG)
  tokens = jnp.ones((2, 16), jnp.int32)
  quiet = dataclasses.replace(noise(), neftune=0.0)

  def hidden(noise):
    return decoder.forward(
        CONFIG, base, None, tokens, POSITIONS, SEGMENTS, noise=noise)[0]

  np.testing.assert_array_equal(hidden(None), hidden(quiet))
  assert (hidden(None) != hidden(noise())).any(-1)[0, :13].all()
  # By hand: the first hidden states are the table's rows and the noise.
  found = embedding.embed(
      base.embed_tokens, adapters_lib.Adapters(), tokens, jnp.float32,
      noise=noise(), segment_ids=SEGMENTS)
  drawn = embedding.neftune(found, noise(), SEGMENTS)
  np.testing.assert_allclose(
      found - drawn, jnp.broadcast_to(base.embed_tokens[1], found.shape),
      atol=1e-6)
