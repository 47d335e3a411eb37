"""Runs whose adapters' start looks at rows go on from the same start."""

from __future__ import annotations

import pytest

from experiments import trained
from tests.experiments import conftest


# Two runs and a third of one; test_resume.py kills runs, and those of
# tests/export/test_starts_informed.py go on from such a start.
@pytest.mark.slow
def test_a_killed_run_goes_on_from_the_same_start(run_command, tmp_path):
  run = dict(adapter__init="lora_ga", adapter__init_batches=2,
             adapter__init_options="direction=ArBr", train__steps=4,
             train__checkpoint_every=2)
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  done = run_command(whole, **run)
  assert done.code == 0, done.err
  assert "looked at up to 2 batches of rows" in done.out
  process = run_command.start(
      killed, die="lora_jax.train.step:train_step:3", **run)
  assert process.wait(conftest.LIMIT) == -9
  start = {p.name: p.stat().st_mtime_ns for p in (killed / "start").iterdir()}
  done = run_command(killed, **run)
  assert done.code == 0, done.err
  assert "looked at" not in done.out
  assert start == {
      p.name: p.stat().st_mtime_ns for p in (killed / "start").iterdir()}
  assert conftest.tensors(killed) == conftest.tensors(whole)
  model = trained.from_workdir(str(whole))
  assert model.replaced is not None
  assert model.adapter_config.init == "lora_ga"


def test_bad_options_are_told_before_a_model_is_loaded(run_command, tmp_path):
  for overrides, message in (
      (dict(adapter__init="eva", adapter__init_options="rho=0.1"),
       "error: adapter.init_options.rho=0.1 is out of range"),
      (dict(adapter__init="eva", adapter__method="vera"),
       "error: adapter.init=eva is for lora, rslora, dora")):
    done = run_command(tmp_path / "x", **overrides)
    assert done.code == 2
    assert done.errors[0].startswith(message)
