"""A kernel in the place of the plain path, and the layouts callers declare."""

from __future__ import annotations

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import types as types_lib
from lora_jax.data import packing
from lora_jax.data import templates
from lora_jax.evaluate import decoding
from lora_jax.evaluate import perplexity
from lora_jax.evaluate import sampling
from lora_jax.kernels import attention
from lora_jax.kernels.attention import api
from lora_jax.kernels.attention import base as base_lib
from lora_jax.kernels.attention import plain
from lora_jax.kernels.attention import splash
from lora_jax.models import cache as cache_lib
from lora_jax.models import decoder
from lora_jax.models import init
from lora_jax.train import step
from tests.models import tiny


def _batch(lengths, t=16):
  rng = np.random.default_rng(0)
  encoded = [
      templates.Encoded(
          tokens=rng.integers(0, tiny.VOCAB, n).astype(np.int32),
          weights=np.ones(n, np.float32)) for n in lengths]
  return packing.fill([list(range(len(lengths))), []], encoded, t)


@pytest.fixture
def seen(monkeypatch):
  """Layouts and windows of all calls; the plain path computes them."""
  found = []

  def run(call):
    found.append((call.options.layout, call.options.windows,
                  call.q.shape[1]))
    return plain.run(call)

  monkeypatch.setattr(
      api, "chosen", lambda call: types.SimpleNamespace(run=run))
  return found


def test_kernel_in_scan_and_remat_with_windows_by_layer(monkeypatch):
  """Layers with and without a window, chosen inside the scan."""
  config = tiny.CONFIGS["qwen3"]
  base = init.random_base(jax.random.key(1), config)
  batch = _batch((9, 5))
  real = batch.segment_ids > 0

  def total(embed, config):
    hidden, _ = decoder.forward(
        config, base.replace(embed_tokens=embed), None, batch.tokens,
        batch.positions, batch.segment_ids, remat="named",
        attention=attention.Options(layout="packed"))
    hidden = hidden * real[..., None]
    return jnp.sum(hidden ** 3), hidden

  def program(config):
    # A new function: jit remembers what it traced.
    return jax.jit(jax.value_and_grad(
        lambda embed: total(embed, config), has_aux=True))(base.embed_tokens)

  (_, expected), slope = program(config)
  kernel = functools.partial(splash.attend, interpret=True)
  monkeypatch.setattr(
      api, "chosen", lambda call: types.SimpleNamespace(run=kernel))
  (_, found), grads = program(config)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  assert tiny.distance(grads, slope) <= 1e-5


def test_callers_declare_what_they_know(seen):
  config = tiny.CONFIGS["qwen3"]
  base = init.random_base(jax.random.key(1), config)
  batch = jax.tree.map(jnp.asarray, _batch((9, 5)))
  key, windows = jax.random.key(0), (6, 2**30)
  none = adapters_lib.Adapters()

  def trace(function, *args, **static):
    seen.clear()
    jax.eval_shape(functools.partial(
        getattr(function, "__wrapped__", function), **static), *args)
    return set(seen)

  assert trace(
      step.weighted_sum, none, none, base, batch, key, model=config,
      settings=step.Settings()) == {("packed", windows, 16)}
  assert trace(
      step.weighted_sum, none, none, base, batch, key, model=config,
      settings=step.Settings(attention=attention.Options(layout="single"))
  ) == {("single", windows, 16)}
  assert trace(perplexity.row_nll, none, base, batch, model=config) == {
      ("packed", windows, 16)}
  rows = jnp.zeros(2, jnp.int32)
  request = decoding.Request(key, rows, rows, sampling.sampling(0.0, 0, 1.0))
  assert trace(
      decoding.prefill, base, none, batch.tokens, rows, rows, 32, request,
      model=config, size=32, dtype="float32") == {("single", windows, 16)}
  cache = cache_lib.init_cache(config, 2, 32)
  state = decoding.State(cache, rows, rows > 0, rows)
  # One token has no layout, and its own path.
  assert not trace(decoding.decode, base, none, state, request, 4,
                   model=config, dtype="float32")


@pytest.mark.parametrize("lengths", [(9, 5), (16,), (1, 1, 3), (7,)])
def test_packed_rows_are_what_the_layout_says(lengths):
  """Of `data.packing`: contiguous segments, whose positions count from 0."""
  batch = _batch(lengths)
  assert isinstance(batch, types_lib.Batch)
  real = batch.segment_ids > 0
  first = np.asarray(base_lib.starts(jnp.asarray(batch.segment_ids)))
  within = np.arange(16) - first
  np.testing.assert_array_equal(within[real], batch.positions[real])
  # No segment appears twice, and padding ends the row.
  for row in batch.segment_ids:
    used = row[row > 0]
    assert (np.diff(used) >= 0).all() and (row[len(used):] == 0).all()
