"""Activations, caps, norms and rotations by hand."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models import cache as cache_lib
from lora_jax.models import config as config_lib
from lora_jax.models import init
from lora_jax.models import layers
from lora_jax.models import rope
from tests.models import tiny


@pytest.mark.parametrize("name", layers.ACTIVATIONS)
def test_activations_equal_those_of_transformers(name):
  torch = pytest.importorskip("torch")
  activations = pytest.importorskip("transformers.activations")
  x = np.linspace(-6, 6, 401, dtype=np.float32)
  theirs = activations.ACT2FN[config_lib.HF_ACTIVATIONS[name]]
  np.testing.assert_allclose(
      layers.ACTIVATIONS[name](x), theirs(torch.tensor(x)).numpy(),
      rtol=1e-5, atol=2e-6)
  assert config_lib.HF_ACTIVATIONS.keys() == layers.ACTIVATIONS.keys()


def test_offset_norm_scales_before_it_rounds():
  x = jax.random.normal(jax.random.key(0), (64, 32), jnp.bfloat16)
  weight = jax.random.normal(jax.random.key(1), (32,), jnp.float32)
  wide = np.asarray(x, np.float32)
  normed = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6)
  expected = (normed * (1 + np.asarray(weight))).astype(jnp.bfloat16)
  out = layers.rms_norm(x, weight, 1e-6, offset=1)
  assert out.dtype == jnp.bfloat16
  # Off by a rounding in few places at most, unlike the other order.
  assert (np.asarray(out) != expected).mean() < 0.01
  early = (normed.astype(jnp.bfloat16) * (1 + weight).astype(jnp.bfloat16))
  assert (np.asarray(early) != expected).mean() > 0.1


def test_partial_rotation_leaves_the_rest_alone():
  config = config_lib.RopeConfig(theta=100.0, partial=0.5)
  cos, sin = rope.tables(config, 8, np.array([[0, 3]]))
  assert cos.shape == (1, 2, 2)
  x = np.arange(1.0, 9.0, dtype=np.float32).reshape(1, 1, 1, 8).repeat(2, 1)
  out = np.asarray(rope.rotate(x, cos, sin))
  np.testing.assert_array_equal(out[0, 1, 0, 4:], x[0, 1, 0, 4:])
  c, s = np.cos([3, 0.3]), np.sin([3, 0.3])
  np.testing.assert_allclose(out[0, 1, 0, :4], [
      1 * c[0] - 3 * s[0], 2 * c[1] - 4 * s[1],
      3 * c[0] + 1 * s[0], 4 * c[1] + 2 * s[1]], rtol=1e-6)


LONG = config_lib.RopeConfig(
    type="longrope", theta=100.0, factor=4.0, original_max_position=6,
    short_factor=(1.0, 2.0), long_factor=(3.0, 5.0))


def test_longrope_goes_by_the_length_of_each_segment():
  positions = np.array([[0, 1, 2, 3, 4, 5, 6, 0, 1, 0],
                        [0, 1, 2, 3, 4, 5, 0, 0, 0, 0]])
  segments = np.array([[1, 1, 1, 1, 1, 1, 1, 2, 2, 0],
                       [1, 1, 1, 1, 1, 1, 0, 0, 0, 0]])
  cos, _ = rope.tables(LONG, 4, positions, segments)
  scale = np.sqrt(1 + np.log(4.0) / np.log(6.0))
  frequencies = 1 / np.array([1.0, 10.0])
  short, long = frequencies / [1.0, 2.0], frequencies / [3.0, 5.0]
  for row, first, past, inverse in (
      (0, 0, 7, long), (0, 7, 9, short), (1, 0, 6, short)):
    expected = np.cos(positions[row, first:past, None] * inverse) * scale
    np.testing.assert_allclose(
        cos[row, first:past], expected, rtol=1e-5, atol=1e-6)


def test_longrope_of_a_cache_goes_by_its_capacity():
  """Growing past the original context never mixes two rotations."""
  family = tiny.CONFIGS["phi3"]
  config = dataclasses.replace(
      family, sliding_window=None, rope=dataclasses.replace(
          family.rope, original_max_position=10))
  base = init.random_base(jax.random.key(1), config)
  row = jax.random.randint(jax.random.key(2), (1, 16), 0, tiny.VOCAB)
  at, ones = jnp.arange(16)[None], jnp.ones_like(row)

  def decoded(n, capacity):
    cache, rows = cache_lib.init_cache(config, 1, capacity), []
    for i in range(n):
      out, cache = tiny.cached_logits(
          config, base, row[:, i:i + 1], at[:, i:i + 1], ones[:, :1], cache)
      rows.append(out[0, 0])
    return np.stack(rows)

  long = tiny.logits(config, base, row, at, ones)[0]
  short = tiny.logits(config, base, row[:, :10], at[:, :10], ones[:, :10])[0]
  assert tiny.distance(long[:10], short) > 1e-2
  assert tiny.distance(decoded(16, 16), long) <= 2e-5
  assert tiny.distance(decoded(10, 10), short) <= 2e-5
