"""Tables: the statistics by hand, the verdicts, what is written."""

from __future__ import annotations

import csv
import json

from matplotlib import pyplot
import numpy as np
import pytest

from configs import grid
from experiments.sweep import cells as cells_lib
from experiments.table import __main__ as table
from experiments.table import plots
from experiments.table import results
from experiments.table import verdicts
from lora_jax import errors
from lora_jax.evaluate import statistics

STUDY = '''"""A study by hand.

What it is about.
"""
from configs import common
from configs import grid

def get_config(arg=""):
  return common.study(local=True)

def sweep(arg=""):
  return grid.cross({"adapter.rank": (1, 2, 4),
                     "optim.learning_rate": (0.1, 0.2, 0.3)},
                    {"seed": (0, 1, 2)})

def tuned(arg=""):
  return ("optim.learning_rate",)

def claims(arg=""):
  return [
      grid.better("two is better", {"adapter.rank": 2}, {"adapter.rank": 1}),
      grid.better("one is better", {"adapter.rank": 1}, {"adapter.rank": 2}),
      grid.same("four is as two", {"adapter.rank": 4}, {"adapter.rank": 2}),
      grid.same("two is as one", {"adapter.rank": 2}, {"adapter.rank": 1}),
      grid.better("not there", {"adapter.rank": 8}, {"adapter.rank": 1}),
  ]
'''
# What a rank costs, and how far a rate is from the best.
LOSS = {1: 1.0, 2: 0.9, 4: 0.9001}
N = 60


def finish(cell, commit="a" * 40):
  """A cell that is done, with a loss by its overrides."""
  rank, rate = (cell.overrides[k] for k in (
      "adapter.rank", "optim.learning_rate"))
  rng = np.random.default_rng(cell.overrides["seed"])  # The same rows.
  weight = rng.integers(5, 9, N).astype(float)
  row = rng.normal(0, 0.3, N)
  loss = LOSS[rank] + abs(rate - 0.2) + row
  nll = (loss + np.random.default_rng(rank).normal(0, 1e-3, N)) * weight
  (cell.folder / "evals").mkdir(parents=True)
  (cell.folder / "evals/5.json").write_text(json.dumps(
      {"nll": nll.tolist(), "weight": weight.tolist()}))
  (cell.folder / "metrics.jsonl").write_text("".join(json.dumps(
      {"step": s, "eval_loss": 2 - s / 10, "perplexity": 1.0}) + "\n"
      for s in (0, 5)))
  (cell.folder / "environment.json").write_text(json.dumps(
      {"git_commit": commit, "device": "cpu", "versions": {"jax": "0"}}))
  (cell.folder / "summary.json").write_text(json.dumps({
      "steps": 5, "wall_seconds": 2.0, "tokens_per_s": 10.0, "together": 2,
      "final_eval_loss": 1.0, "trainable_parameters": 100 * rank}))


@pytest.fixture
def no_pictures(monkeypatch):
  """They take seconds; one test looks at them."""
  monkeypatch.setattr(plots, "draw", lambda *_: [])


@pytest.fixture
def sweep(tmp_path):
  path = tmp_path / "hand.py"
  path.write_text(STUDY)
  study = cells_lib.study(str(path), tmp_path / "sweep")
  for cell in study.cells:
    finish(cell)
  (tmp_path / "sweep/sweep.json").write_text(json.dumps({
      "study": str(path), "arg": "", "set": {}, "git_commit": "a" * 40,
      "cells": [c.name for c in study.cells]}))
  return study


def test_resampling_seeds_and_rows_has_the_spread_of_both():
  rng = np.random.default_rng(0)
  k, n, between, within = 8, 200, 0.5, 1.0
  groups = [(rng.normal(m, within, n), np.ones(n))
            for m in rng.normal(3, between, k)]
  found = statistics.over_seeds(groups, resamples=4000)
  means = np.array([x.mean() for x, _ in groups])
  assert found.value == pytest.approx(means.mean())
  # Drawing k of k seeds, then n of n rows: variances by hand.
  rows = np.mean([x.var() for x, _ in groups]) / n / k
  assert found.draws.var() == pytest.approx(means.var() / k + rows, rel=0.1)
  low, high = found.interval()
  assert low < found.value < high
  wide = found.interval(0.99)
  assert wide[0] < low and high < wide[1]
  # Rows count by their tokens.
  heavy = statistics.over_seeds([(np.array([1.0, 30.0]), np.array([1, 10]))])
  assert heavy.value == pytest.approx(31 / 11)


def test_p_values():
  draws = np.arange(-10, 90) / 10  # 11 of 100 at most 0.
  assert statistics.Samples(4.0, draws).p_value() == pytest.approx(24 / 101)
  assert statistics.Samples(4.0, draws + 99).p_value() == pytest.approx(
      2 / 101)
  # Holm's: 0.01 * 3, 0.02 * 2, and never less than one before.
  assert statistics.holm([0.02, 0.01, 0.03]) == pytest.approx(
      [0.04, 0.03, 0.04])
  assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]


def test_verdicts_and_tuning(sweep, tmp_path, capsys):
  judged = table.make(tmp_path / "sweep", tmp_path / "out")
  assert [v.verdict for v in judged] == [
      "held", "refuted", "held", "refuted", "not run"]
  assert "rank=2 less rank=1: -0.0999" in judged[0].numbers
  assert "3 seeds" in judged[0].numbers
  rows = list(csv.reader((tmp_path / "out/table.csv").open()))
  assert [r[0] for r in rows] == ["arm", "rank=1", "rank=2", "rank=4"]
  assert {r[1] for r in rows[1:]} == {"learning_rate=0.2"}
  assert float(rows[2][4]) == pytest.approx(-0.1, abs=1e-3)
  assert rows[1][4] == "" and float(rows[2][6]) < 0.001
  assert "of 27 cells" in capsys.readouterr().out
  text = (tmp_path / "out/README.md").read_text()
  assert text.startswith("# A study by hand.") and "**refuted**" in text
  html = (tmp_path / "out/index.html").read_text()
  assert html.count("data:image/png;base64,") == 4  # curves factor map pareto
  assert "src=" in html and "http" not in html  # Self-contained.


def test_an_edge_of_what_was_tried_is_marked(sweep):
  found = results.runs(sweep.cells)
  arms = results.arms([
      r for r in found if r.cell.overrides["optim.learning_rate"] > 0.15
      or r.cell.overrides["adapter.rank"] == 1], ("optim.learning_rate",))
  assert [arm.edge for arm in arms] == [False, True, True]
  judged = verdicts.judge(sweep.claims, arms)
  assert judged[0].verdict == "held" and judged[0].numbers.endswith(
      "3 seeds; at the edge of what was tried: rank=2")
  assert "tried: rank=1" not in "".join(v.numbers for v in judged)


def test_an_arm_some_of_whose_cells_are_not_done_has_no_verdict(
    sweep, tmp_path, no_pictures):
  gone = next(c for c in sweep.cells if c.overrides["adapter.rank"] == 2)
  (gone.folder / "summary.json").unlink()
  judged = table.make(tmp_path / "sweep", tmp_path / "out")
  about = ["rank=2" in v.numbers for v in judged]
  assert any(about)
  for verdict, it_is in zip(judged, about, strict=True):
    assert (verdict.numbers == "rank=2: 1 of its cells not done") == it_is
    assert verdict.verdict == "not run" or not it_is
  text = (tmp_path / "out/README.md").read_text()
  assert "rank=2 ‡" in text and "rank=4 ‡" not in text
  assert "Not run" not in text
  for cell in sweep.cells:
    if cell.overrides["adapter.rank"] == 2:
      (cell.folder / "summary.json").unlink(missing_ok=True)
  table.make(tmp_path / "sweep", tmp_path / "out")
  text = (tmp_path / "out/README.md").read_text()
  assert "18 of 27 cells" in text and "Not run: rank=2. Loss" in text


def test_steps_of_different_sizes_are_drawn_over_rows(sweep):
  figure, axes = pyplot.subplots(1, 2)
  for one in axes:
    arms = results.arms(results.runs(sweep.cells), ("optim.learning_rate",))
    plots.PICTURES["curves"](figure, one, arms, [], arms[0])
    for cell in sweep.cells:
      if cell.overrides["adapter.rank"] == 2:
        cell.config["train"] |= {"batch_size": 8, "accumulation": 3}
  rows = sweep.cells[0].config["train"]["batch_size"]
  assert [one.get_xlabel() for one in axes] == ["step", "rows trained on"]
  assert [list(line.get_xdata()) for line in axes[0].lines] == [[0, 5]] * 3
  assert [list(line.get_xdata()) for line in axes[1].lines] == [
      [0, 5 * rows], [0, 5 * 24], [0, 5 * rows]]
  pyplot.close(figure)


def test_undecided_if_seeds_differ_by_more_than_is_claimed(sweep):
  arms = results.arms(results.runs(sweep.cells), ("optim.learning_rate",))
  claim = grid.same("", {"adapter.rank": 4}, {"adapter.rank": 2}, within=5e-5)
  assert verdicts.judge([claim], arms)[0].verdict == "undecided"
  with pytest.raises(errors.UsageError, match="claim kind"):
    verdicts.judge([claim | {"kind": "smae"}], arms)


def test_cells_of_different_commits_are_not_mixed(
    sweep, tmp_path, no_pictures):
  folder = sweep.cells[0].folder / "environment.json"
  folder.write_text(json.dumps({"git_commit": "b" * 40}))
  with pytest.raises(errors.UserError, match=r"bbbbbbbbbbbb \(1 cells\)"):
    table.make(tmp_path / "sweep", tmp_path / "out")
  table.make(tmp_path / "sweep", tmp_path / "out", mix=True)
  text = (tmp_path / "out/README.md").read_text()
  # The cell was not the chosen one of its arm: but a cell of it is marked.
  assert "bbbbbbbbbbbb" in text


def test_against_committed_results(
    sweep, tmp_path, capsys, no_pictures):
  out = tmp_path / "out"
  table.make(tmp_path / "sweep", out)
  capsys.readouterr()

  def lines():
    table.make(tmp_path / "sweep", tmp_path / "again", other=out)
    return capsys.readouterr().out.partition("against ")[2].splitlines()

  same = lines()
  assert "27 cells of its 27 and of 27 here" in same[0]
  assert "difference of a cell 0.0000" in same[0] and "0.0000 (" in same[1]
  assert same[2:] == ["the same verdicts"]
  text = (out / "README.md").read_text()
  (out / "README.md").write_text(text.replace("**held**", "**refuted**", 1))
  for name, old, new in (("table.csv", "learning_rate=0.2", "learning_rate=9"),
                         ("cells.csv", "rank=1,", "rank=77,")):
    path = out / name
    path.write_text(path.read_text().replace(old, new, 1))
  other = lines()
  assert "26 cells of its 27 and of 27 here" in other[0]
  assert other[1] == (
      "rank=1: tuned to learning_rate=0.2, there to learning_rate=9")
  assert "2 arms tuned alike" in other[2]
  assert other[3].endswith(": held, there refuted") and len(other) == 4
  with pytest.raises(errors.UserError, match=r"holds no cells\.csv"):
    table.make(tmp_path / "sweep", out, other=tmp_path)


def test_a_folder_without_results_says_what_to_do(tmp_path, sweep):
  with pytest.raises(errors.UserError, match=r"no sweep\.json"):
    table.make(tmp_path, tmp_path)
  for cell in sweep.cells:
    (cell.folder / "summary.json").unlink()
  with pytest.raises(errors.UserError, match="none of its 27 cells"):
    table.make(tmp_path / "sweep", tmp_path)
