"""Watched rows: what a run says of others, and claims about that."""

from __future__ import annotations

import json

import numpy as np
import pytest

from configs import grid
from experiments.sweep import cells as cells_lib
from experiments.table import page
from experiments.table import results
from experiments.table import verdicts
from lora_jax import errors
from tests.experiments import conftest


def run(method, change, seed=0, n=80):
  """A run by hand whose watched rows lost `change` nats a token."""
  rng = np.random.default_rng(seed)
  weight = rng.integers(5, 9, n).astype(float)
  cell = cells_lib.Cell(
      f"{method},{seed}", {"adapter.method": method, "seed": seed},
      {"seed": seed}, None)
  noise = rng.normal(0, 0.01, n)
  return results.Run(
      cell, {"trainable_parameters": 1, "tokens_per_s": 1}, "a", weight,
      weight, None if change is None else ((change + noise) * weight, weight))


def judged(claim, *runs):
  return verdicts.judge([claim], results.arms(runs, ()))[0]


ARMS = {"adapter.method": "lora"}, {"adapter.method": "full"}


@pytest.mark.parametrize("lora, full, verdict", [
    (0.1, 0.3, verdicts.HELD), (0.2, 0.3, verdicts.REFUTED),
    (0.15, 0.3, verdicts.UNDECIDED)])
def test_a_claim_about_half_of_what_another_forgets(lora, full, verdict):
  claim = grid.better("forgets half", *ARMS, of="watched", times=0.5)
  found = judged(claim, *(run(m, c, s) for m, c in (
      ("lora", lora), ("full", full)) for s in range(3)))
  assert found.verdict == verdict
  assert "0.5 of method=full" in found.numbers
  assert f"{lora - full / 2:+.2f}"[:4] in found.numbers


@pytest.mark.parametrize("change, verdict", [
    (0.1, verdicts.HELD), (-0.1, verdicts.REFUTED)])
def test_a_share_of_what_was_not_forgotten_says_nothing(change, verdict):
  runs = [run("lora", -0.2), run("full", change)]
  assert judged(grid.rises("it forgets", ARMS[1]), *runs).verdict == verdict
  half = judged(grid.better("half", *ARMS, of="watched", times=0.5), *runs)
  assert half.verdict == (
      verdicts.HELD if change > 0 else verdicts.UNDECIDED)
  assert ("is above 0" in half.numbers) == (change < 0)


def test_the_table_shows_it_only_where_there_is_something():
  arms = results.arms([run("lora", 0.25), run("full", 0.5)], ())
  columns, cells = page.shown(page.rows(arms, arms[0], "a"))
  assert cells[0][columns.index("watched")].startswith("+0.25")
  arms = results.arms([run("lora", None), run("full", None)], ())
  assert "watched" not in page.shown(page.rows(arms, arms[0], "a"))[0]


def test_a_claim_without_watched_rows_is_an_error():
  claim = grid.better("forgets half", *ARMS, of="watched")
  with pytest.raises(errors.UserError, match=r"data\.watch_path"):
    judged(claim, run("lora", None), run("full", None))
  claim = grid.better("forgets half", *ARMS, of="watchd")
  with pytest.raises(errors.UsageError, match='"watched"'):
    judged(claim, run("lora", None), run("full", None))


def test_a_run_watches(run_command, tmp_path):
  other = conftest.write_rows(tmp_path / "other.jsonl", [
      {"text": f"the {word} sat on the mat"} for word in ("cat", "dog", "cow")])
  done = run_command(
      tmp_path / "run", data__watch_path=other, data__watch_rows=2,
      train__steps=2, train__neftune_noise_alpha=5.0,
      optim__learning_rate=0.01)
  assert done.code == 0, done.err
  assert "watched rows" in done.out
  summary = json.loads((tmp_path / "run/summary.json").read_text())
  rows = json.loads((tmp_path / "run/watched.json").read_text())
  before, after, weight = (np.array(rows[k]) for k in (
      "before", "after", "weight"))
  assert len(weight) == 2 and (weight > 3).all()
  assert summary["watched_before"] == pytest.approx(
      before.sum() / weight.sum(), rel=1e-6)
  assert summary["watched_change"] == pytest.approx(
      (after - before).sum() / weight.sum(), rel=1e-4)
  assert summary["watched_after"] != summary["watched_before"]


def test_rows_that_are_all_too_long(run_command, tmp_path):
  other = conftest.write_rows(tmp_path / "other.jsonl", [{"text": "long" * 99}])
  done = run_command(tmp_path / "run", data__watch_path=other)
  assert done.code == 2
  assert "data.watch_path" in done.errors[0]
  assert "data.eval_max_length=64" in done.errors[0]
