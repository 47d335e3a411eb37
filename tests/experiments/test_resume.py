"""Killed runs that go on end with the bytes of one that was not killed."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.experiments import conftest

# Two epochs of packed rows, dropout, two micro-batches a step.
RUN = dict(
    adapter__dropout=0.2, train__accumulation=2, train__batch_size=1,
    train__steps=8, train__eval_every=3, train__checkpoint_every=2,
    train__samples=1, data__max_length=128, optim__learning_rate=0.01)

# What is called at the moment of the kill; a run is killed at all of them.
MOMENTS = {
    "between steps": "lora_jax.train.step:train_step:4",
    "in an evaluation": "lora_jax.evaluate.perplexity:row_nll:1",
    "while the adapter is written": "lora_jax.export.tensors:write:1",
    "after the last step": "experiments.report:summary:1",
}
# A run is started again for each: all of them with -m slow.
FEW = "between steps", "while the adapter is written"
TIMES = ("wall_seconds", "compile_seconds", "compiles", "tokens_per_s",
         "peak_host_bytes", "peak_device_bytes")


@pytest.fixture(scope="module")
def whole(run_command, tmp_path_factory):
  """The work directory of a run that was not killed."""
  folder = tmp_path_factory.mktemp("resume") / "whole"
  done = run_command(folder, **RUN)
  assert done.code == 0, done.err
  return folder


def result(folder):
  """All of a work directory that must not depend on kills."""
  def timeless(values):
    return {k: v for k, v in values.items() if k not in TIMES}

  return {
      "metrics": [timeless(x) for x in conftest.metrics(folder)],
      "summary": timeless(json.loads((folder / "summary.json").read_text())),
      "config": (folder / "config.json").read_text(),
      "samples": (folder / "samples.md").read_text(),
      "adapter": {p.name: p.read_bytes()
                  for p in (folder / "adapter").iterdir()},
      "evals": {p.name: p.read_text()
                for p in (folder / "evals").iterdir()},
  }


def test_a_run_has_every_step_once(whole):
  lines = conftest.metrics(whole)
  assert [x["step"] for x in lines if "loss" in x] == list(range(1, 9))
  assert [x["step"] for x in lines if "eval_loss" in x] == [0, 3, 6, 8]
  tokens = [x["tokens"] for x in lines if "loss" in x]
  assert tokens == sorted(set(tokens))


@pytest.mark.parametrize("moments", [
    FEW, pytest.param(tuple(MOMENTS), marks=pytest.mark.slow)], ids=len)
def test_kills_change_nothing(moments, whole, run_command, tmp_path):
  folder = tmp_path / "run"

  def has_line(step):
    path = folder / "metrics.jsonl"
    return path.exists() and f'"step": {step},' in path.read_text()

  def writes_checkpoint(step):
    return (any((folder / "checkpoints").glob(f"{step}*"))
            and not (folder / "checkpoints/sha256" / f"{step}.json").exists())

  # From outside: while the step compiles; while a checkpoint is written.
  if moments != FEW:
    run_command.kill_when(lambda: has_line(0), folder, **RUN)
  run_command.kill_when(lambda: writes_checkpoint(2), folder, **RUN)
  assert not (folder / "checkpoints/sha256/2.json").exists()
  for moment in moments:
    process = run_command.start(folder, die=MOMENTS[moment], **RUN)
    assert process.wait(conftest.LIMIT) == -9, moment
  with open(folder / "metrics.jsonl", "a") as f:
    f.write('{"step": 8, "lo')  # What a crash may leave.
  done = run_command(folder, **RUN)
  assert done.code == 0, done.err
  assert result(folder) == result(whole)
  for part in (".", "checkpoints", "checkpoints/sha256"):
    left = {p.name for p in (folder / part).iterdir()}
    assert left == {p.name for p in (whole / part).iterdir()}


def _damage(folder, how):
  files = [p for p in (folder / "state").rglob("*")
           if p.is_file() and p.stat().st_size]
  path = max(files, key=lambda p: p.stat().st_size)
  data = path.read_bytes()
  if how == "cut":
    path.write_bytes(data[:len(data) // 2])
  elif how == "flip":
    middle = len(data) // 2
    path.write_bytes(
        data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1:])
  else:
    path.unlink()


def test_a_damaged_checkpoint_is_passed_over(whole, run_command, tmp_path):
  folder = shutil.copytree(whole, tmp_path / "run")
  _damage(folder / "checkpoints/8", "flip")
  done = run_command(folder, **RUN)
  assert done.code == 0, done.err
  assert "checkpoints/8 is damaged" in done.err
  assert "going on from step 6" in done.out
  assert result(folder) == result(whole)


@pytest.mark.slow  # As above, twice; and then it is a run like any other.
def test_without_a_sound_checkpoint_it_starts_over(
    whole, run_command, tmp_path):
  folder = shutil.copytree(whole, tmp_path / "run")
  _damage(folder / "checkpoints/8", "cut")
  _damage(folder / "checkpoints/6", "delete")
  done = run_command(folder, **RUN)
  assert done.code == 0, done.err
  assert done.err.count("is damaged") == 2
  assert "going on" not in done.out
  assert result(folder) == result(whole)


def test_a_finished_run_stays_as_it_is(whole, run_command, tmp_path):
  folder = shutil.copytree(whole, tmp_path / "run")
  done = run_command(folder, **RUN)
  assert done.code == 0, done.err
  assert "going on from step 8" in done.out
  assert result(folder) == result(whole)
