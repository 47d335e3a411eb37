"""The range test: its rates, and what is read off a curve made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from configs import grid
from experiments import finder
from experiments.table import results
from experiments.table import verdicts
from lora_jax import errors
from lora_jax.train import optim
from tests.experiments import test_watched as by_hand


def test_the_rate_grows_by_equal_factors_up_to_the_peak():
  config = optim.OptimConfig(
      learning_rate=0.1, schedule="range", final=1e-4, warmup=0.0)
  rates = optim.learning_rates(config.validate(), 40)
  np.testing.assert_allclose(rates[-1], 0.1, rtol=1e-6)
  np.testing.assert_allclose(rates[0], 0.1 * 1e-4**(39 / 40), rtol=1e-5)
  np.testing.assert_allclose(rates[1:] / rates[:-1], 1e4**(1 / 40), rtol=1e-4)
  with pytest.raises(errors.UsageError, match=r"optim\.final"):
    optim.OptimConfig(schedule="range").validate()


def curve(diverges=True, n=200):
  """A loss that is lowest at 1e-2, with noise."""
  rates = np.geomspace(1e-5, 1e-1, n)
  far = np.log10(rates / 1e-2)
  losses = 2 + 0.2 * far**2
  if diverges:
    losses = np.where(rates > 5e-2, 1e3, losses)
  noise = np.random.default_rng(0).normal(0, 0.02, n)
  return [{"step": i, "lr": r, "loss": x} for i, (r, x) in enumerate(
      zip(rates, losses + noise, strict=True), 1)]


@pytest.mark.parametrize("diverges", [True, False])
def test_a_tenth_of_the_rate_at_the_lowest_loss(diverges):
  lines = [{"step": 0, "eval_loss": 2.0}, *curve(diverges)]
  found = finder.advice(lines)
  # Within a window, a tenth of four decades.
  assert 10**-2.2 < found["lowest_loss_rate"] < 10**-1.8
  assert found["suggested_learning_rate"] == pytest.approx(
      found["lowest_loss_rate"] / 10)
  assert "begin with a tenth" in found["advice"]
  rates, losses = finder.points(lines)
  assert rates[-1] < 0.06 if diverges else rates[-1] > 0.06
  assert (losses < 5).all() or diverges


def test_an_easy_first_batch_is_no_lowest_loss():
  lines = curve()
  lines[0]["loss"] = 1.2
  assert finder.advice(lines)["lowest_loss_rate"] > 5e-3


def test_a_test_that_ends_too_early_says_so():
  assert "higher rate" in finder.advice(curve()[:100])["advice"]
  assert finder.advice([]) == {}


@pytest.mark.parametrize("rates, verdict", [
    ((1e-3, 2e-3), verdicts.HELD), ((1e-3, 1.0), verdicts.UNDECIDED),
    ((0.5, 1.0), verdicts.REFUTED)])
def test_a_claim_about_a_number(rates, verdict):
  runs = [by_hand.run("lora", None, seed) for seed in range(2)]
  for run, rate in zip(runs, rates, strict=True):
    run.summary["suggested_learning_rate"] = rate
  claim = grid.between("it is good", {"adapter.method": "lora"},
                       "suggested_learning_rate", 5e-4, 5e-3)
  found, = verdicts.judge([claim], results.arms(runs, ()))
  assert found.verdict == verdict and "wanted 0.0005 to 0.005" in found.numbers
