"""Losses of rows against torch, and the paired interval by hand."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import types
from lora_jax.evaluate import perplexity
from lora_jax.evaluate import statistics
from lora_jax.models import init
from tests import tiny

LENGTHS = (7, 24, 15)


def _batch(rng, lengths, t, fill=0):
  """One row an example, random weights; `fill` more rows of padding."""
  shape = (len(lengths) + fill, t)
  real = np.arange(t) < np.asarray([*lengths, *[0] * fill])[:, None]
  tokens = np.where(real, rng.integers(0, 61, shape), 0).astype(np.int32)
  targets = np.roll(tokens, -1, 1)
  last = real & ~np.pad(real, ((0, 0), (0, 1)))[:, 1:]
  weights = np.where(real & ~last, rng.random(shape), 0).astype(np.float32)
  return types.Batch(
      tokens=tokens, targets=targets, loss_weights=weights,
      positions=np.where(real, np.arange(t), 0).astype(np.int32),
      segment_ids=real.astype(np.int32),
      example_ids=np.where(real, 0, -1).astype(np.int32))


@pytest.fixture(scope="module")
def model():
  config = tiny.CONFIGS["mistral"]
  return config, init.random_base(jax.random.key(1), config)


def test_row_losses_equal_torch(model, tmp_path):
  torch = pytest.importorskip("torch")
  config, base = model
  reference = tiny.to_torch(config, base, tmp_path)
  rng = np.random.default_rng(3)
  batch = _batch(rng, LENGTHS, 32, fill=1)
  # Given in another order than that of their indices.
  rows = perplexity.row_losses(
      None, base, [(batch, np.asarray([2, 0, 1]))], model=config)
  for row, index in enumerate((2, 0, 1)):
    n = LENGTHS[row]
    logits = torch.from_numpy(
        tiny.torch_logits(reference, batch.tokens[row:row + 1, :n])[0])
    nll = torch.nn.functional.cross_entropy(
        logits[:-1], torch.from_numpy(batch.tokens[row, 1:n]).long(),
        reduction="none").numpy()
    weights = batch.loss_weights[row, :n - 1]
    np.testing.assert_allclose(
        rows.nll[index], (nll * weights).sum(), rtol=2e-5)
    np.testing.assert_allclose(rows.weight[index], weights.sum(), rtol=1e-6)
  assert len(rows.nll) == 3
  expected = rows.nll.sum() / rows.weight.sum()
  assert rows.loss == pytest.approx(expected)
  assert rows.perplexity == pytest.approx(np.exp(expected))


def test_batches_and_padding_change_nothing(model):
  config, base = model
  block = adapters_lib.AdapterConfig(rank=2)
  adapters = tiny.random_adapters(config, base, block)
  whole = _batch(np.random.default_rng(4), LENGTHS, 32)

  def part(rows, t):
    batch = jax.tree.map(lambda x: x[rows, :t], whole)
    return batch, np.asarray(rows)

  together = perplexity.row_losses(
      adapters, base, [(whole, np.arange(3))], model=config)
  apart = perplexity.row_losses(
      adapters, base, [part([1], 32), part([0, 2], 16)], model=config)
  np.testing.assert_allclose(together.nll, apart.nll, rtol=2e-6)
  np.testing.assert_array_equal(together.weight, apart.weight)
  plain = perplexity.row_losses(
      None, base, [(whole, np.arange(3))], model=config)
  assert np.abs(plain.nll - together.nll).min() > 1e-2


def test_paired_difference_by_hand():
  """Two rows: a resample is both first, both second, or (half) one of each."""
  before, after = np.asarray([10.0, 4.0]), np.asarray([7.0, 4.5])
  weight = np.asarray([3.0, 1.0])
  found = statistics.paired_difference(before, after, weight)
  assert found.mean == pytest.approx(-2.5 / 4)
  # A quarter of resamples each give -3/3 and +0.5/1.
  assert (found.low, found.high) == pytest.approx((-1.0, 0.5))
  assert str(found) == "-0.6250 [-1.0000, +0.5000]"


def test_paired_interval_follows_the_normal_law():
  """Many rows of one token: mean +- 1.96 standard errors."""
  rng = np.random.default_rng(0)
  n = 2000
  before = rng.normal(2.0, 5.0, n)
  delta = rng.normal(-0.1, 1.0, n)
  found = statistics.paired_difference(before, before + delta, np.ones(n))
  half = 1.96 * delta.std() / np.sqrt(n)
  assert found.mean == pytest.approx(delta.mean())
  # A percentile of 10,000 resamples is known to 1.4% of the half-width.
  assert found.low == pytest.approx(delta.mean() - half, abs=0.05 * half)
  assert found.high == pytest.approx(delta.mean() + half, abs=0.05 * half)
  again = statistics.paired_difference(before, before + delta, np.ones(n))
  assert again == found


def test_no_change_is_exactly_zero():
  x = np.arange(1.0, 9.0)
  found = statistics.paired_difference(x, x, x)
  assert (found.mean, found.low, found.high) == (0, 0, 0)
