"""Studies: cells, groups, what is done stays done, hosts share a folder."""

from __future__ import annotations

import json
import os
import time

import jax
import numpy as np
import pytest

from configs import grid
from experiments.sweep import __main__ as sweep
from experiments.sweep import cells as cells_lib
from experiments.sweep import together
from lora_jax import errors

STUDY = '''
from configs import common
from configs import grid

def get_config(arg=""):
  config = common.study(local=True)
  config.model.path = {model!r}
  config.data.path = {data!r}
  config.data.rows = 0
  config.data.eval_rows = 6
  config.data.max_length = config.data.eval_max_length = 64
  config.quant.block_size = 8
  config.train.steps = 4
  config.train.batch_size = 2
  config.train.log_every = 1
  config.adapter.targets = "q_proj"
  return config

def sweep(arg=""):
  return {cells}

def claims(arg=""):
  return []
'''
CELLS = ('grid.cross({"adapter.rank": (2, 3)}, {"seed": (0, 1)}) '
         '+ [{"adapter.method": "ia3"}]')


@pytest.fixture
def write(tmp_path, tiny_model, tiny_rows):
  def one(cells=CELLS, name="tiny"):
    path = tmp_path / f"{name}.py"
    path.write_text(STUDY.format(
        model=str(tiny_model), data=str(tiny_rows), cells=cells))
    return str(path)

  return one


def test_cells_of_a_grid():
  assert grid.cross({"a": (1, 2)}, {"b": (3,), "c": (4, 5)}) == [
      {"a": 1, "b": 3, "c": 4}, {"a": 1, "b": 3, "c": 5},
      {"a": 2, "b": 3, "c": 4}, {"a": 2, "b": 3, "c": 5}]
  assert grid.zipped({"a": (1, 2), "b": (3, 4)}) == [
      {"a": 1, "b": 3}, {"a": 2, "b": 4}]
  assert grid.cross(grid.zipped({"a": (1, 2), "b": (3, 4)}), {"c": (5,)}) == [
      {"a": 1, "b": 3, "c": 5}, {"a": 2, "b": 4, "c": 5}]
  with pytest.raises(ValueError, match="different numbers"):
    grid.zipped({"a": (1,), "b": (3, 4)})


def test_names_tell_cells_apart():
  assert cells_lib.names([{"adapter.rank": 8, "seed": 0}, {}]) == [
      "rank=8,seed=0", "base"]
  assert cells_lib.names([{"a.x": 1e-3, "b.x": "q/r"}]) == [
      "a.x=0.001,b.x=q_r"]
  with pytest.raises(errors.UsageError, match="rank=1 2 times"):
    cells_lib.names([{"adapter.rank": 1}, {"adapter.rank": 1}])


def test_a_field_that_does_not_exist_is_named(write, tmp_path):
  with pytest.raises(errors.UsageError, match=r'mean "adapter\.rank"'):
    cells_lib.study(write('[{"adapter.rnak": 1}]'), tmp_path)
  with pytest.raises(errors.UsageError, match="no int"):
    cells_lib.study(write(), tmp_path, {"train.steps": "few"})
  with pytest.raises(errors.UsageError, match="no sweep"):
    cells_lib.study("configs/quickstart.py", tmp_path)


def test_a_sweep_runs_side_by_side_what_runs_in_turn_gives(
    write, tmp_path, capsys):
  study = cells_lib.study(write(), tmp_path / "a")
  groups = together.plan(study.cells, 8)
  assert [[c.name for c in g] for g in groups] == [
      ["rank=2,seed=0", "rank=2,seed=1", "rank=3,seed=0", "rank=3,seed=1"],
      ["method=ia3"]]
  sweep.run(study, tmp_path / "a", 8)
  said = capsys.readouterr().out
  assert "side by side: [0] rank=2,seed=0, " in said and "5 done" in said
  turn = cells_lib.study(write(), tmp_path / "b")
  sweep.run(turn, tmp_path / "b", 1)
  for one, other in zip(study.cells, turn.cells, strict=True):
    a, b = one.summary(), other.summary()
    assert a["together"] == (1 if one.name == "method=ia3" else 4)
    assert b["together"] == 1
    np.testing.assert_allclose(
        a["final_eval_loss"], b["final_eval_loss"], rtol=1e-5)
    for name in ("config.json", "environment.json", "metrics.jsonl",
                 "loss.png", "adapter/adapter_config.json"):
      assert (one.folder / name).exists(), name
    # As the run of this config alone would have it.
    assert json.loads((one.folder / "config.json").read_text()) == one.config
  losses = {c.summary()["final_eval_loss"] for c in study.cells}
  assert len(losses) == 5


def test_what_is_done_stays_and_what_failed_is_told(write, tmp_path, capsys):
  cells = ('[{"adapter.rank": 2}, {"adapter.rank": 3}, '
           '{"optim.learning_rate": 100.0, "adapter.rank": 2}, '
           '{"adapter.targets": "nothing"}]')
  study = cells_lib.study(write(cells), tmp_path / "a")
  sweep.run(study, tmp_path / "a", 8)
  said = capsys.readouterr().out
  states = [c.state for c in study.cells]
  assert states[:2] == ["done", "done"] and states[3] == "failed"
  assert 'adapter.targets: "nothing"' in (
      study.cells[3].folder / "error").read_text()
  assert "failed: adapter.targets" in said
  before = (study.cells[0].folder / "summary.json").stat().st_mtime_ns
  (study.cells[1].folder / "summary.json").unlink()
  sweep.run(study, tmp_path / "a", 8)
  assert study.cells[1].state == "done"
  assert (study.cells[0].folder / "summary.json").stat().st_mtime_ns == before
  other = cells_lib.study(write(name="other"), tmp_path / "a")
  with pytest.raises(errors.UsageError, match="choose another --workdir"):
    sweep.run(other, tmp_path / "a", 8)


def test_a_cell_is_one_hosts(write, tmp_path, monkeypatch):
  cell, *_ = cells_lib.study(write(), tmp_path).cells
  mine, theirs = cells_lib.Claim(cell), cells_lib.Claim(cell)
  assert mine.take() and not theirs.take()
  assert cell.state == "running"
  mine.release()
  assert cell.state == "open" and theirs.take()
  # One whose host was killed: nobody renews it.
  old = time.time() - 2 * cells_lib.STALE
  os.utime(cell.folder / "claim", (old, old))
  assert cell.state == "open" and mine.take()
  theirs.release()  # It is no longer theirs to give.
  assert cell.state == "running"
  # One that was done while we looked.
  (cell.folder / "summary.json").write_text("{}")
  mine.release()
  assert cells_lib.claimed([cell], lambda c: True) == []


def test_the_plan_is_told_before_anything_runs(write, tmp_path, capsys):
  study = cells_lib.study(write(), tmp_path / "a")
  sweep.show(study, together.plan(study.cells, 8))
  said = capsys.readouterr().out
  assert "5 cells, 5 to run in 2 groups" in said
  assert "4 side by side: rank=2,seed=0" in said
  assert not (tmp_path / "a").exists()


def test_a_group_without_memory_fails_and_the_rest_goes_on(
    write, tmp_path, monkeypatch, capsys):
  def full(*args, **kwargs):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no more\nat all")

  monkeypatch.setattr(together.training_lib, "fit", full)
  study = cells_lib.study(write(), tmp_path / "a")
  sweep.run(study, tmp_path / "a", 8)
  said = capsys.readouterr().out
  assert [c.state for c in study.cells] == ["failed"] * 4 + ["done"]
  assert "RESOURCE_EXHAUSTED: no more; try --together=2 --retry" in said
