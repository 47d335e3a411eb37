"""Files that are whole, and metrics that are cut to a step."""

from __future__ import annotations

import json
import os

import pytest

from lora_jax import errors
from lora_jax.train import workdir


def test_write_replaces_whole(tmp_path, monkeypatch):
  path = tmp_path / "deep/er/value.json"
  workdir.write_json(path, {"a": 1})
  assert json.loads(path.read_text()) == {"a": 1}

  def stop(*unused):
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr(workdir.os, "fsync", stop)
    with pytest.raises(errors.UserError, match=r"value.json: No space left"):
      workdir.write_json(path, {"a": 2})
  assert json.loads(path.read_text()) == {"a": 1}


def _steps(path):
  return [x["step"] for x in map(json.loads, path.read_text().splitlines())]


def test_metrics_are_cut_to_the_step(tmp_path):
  path = tmp_path / "metrics.jsonl"
  for step, kept in ((-1, []), (2, [0, 1, 2, 2]), (9, [0, 1, 2, 2, 3])):
    path.write_text("".join(
        json.dumps({"step": s, "x": 0.1 + s}) + "\n" for s in (0, 1, 2, 2, 3)))
    metrics = workdir.Metrics(path, step)
    metrics.write({"step": step + 1})
    metrics.sync()
    metrics.close()
    assert _steps(path) == [*kept, step + 1]


@pytest.mark.parametrize("tail", [
    '{"step": 2, "los', '{"step": 2', "\x00\x00\x00", "3\n", "[]\n", '{}\n',
    "\xff"])
def test_metrics_drop_a_line_cut_short(tail, tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(b'{"step": 1, "loss": 0.1}\n' + tail.encode("latin-1"))
  assert workdir.read_metrics(path) == [{"step": 1, "loss": 0.1}]
  metrics = workdir.Metrics(path, 5)
  metrics.write({"step": 2, "loss": 0.25})
  metrics.close()
  assert path.read_text() == (
      '{"step": 1, "loss": 0.1}\n{"step": 2, "loss": 0.25}\n')


def test_floats_survive(tmp_path):
  value = 1.9401329755783081
  metrics = workdir.Metrics(tmp_path / "metrics.jsonl", -1)
  metrics.write({"step": 1, "loss": value})
  metrics.close()
  workdir.Metrics(tmp_path / "metrics.jsonl", 1).close()
  (line,) = workdir.read_metrics(tmp_path / "metrics.jsonl")
  assert line["loss"] == value


@pytest.mark.skipif(
    not os.path.exists("/dev/full"), reason="needs a device that is full")
def test_metrics_on_a_full_disk(tmp_path):
  path = tmp_path / "metrics.jsonl"
  metrics = workdir.Metrics(path, -1)
  metrics.write({"step": 1})
  metrics.close()
  metrics._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
  with pytest.raises(errors.UserError, match=r"No space left.*free space"):
    metrics.write({"step": 2})
  metrics.close()  # Does not try the line again.
  assert _steps(path) == [1]


def test_metrics_below_a_file(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(errors.UserError, match="choose another --workdir"):
    workdir.Metrics(tmp_path / "file/metrics.jsonl", -1)


def test_no_commit_outside_of_git(monkeypatch):
  monkeypatch.setenv("PATH", "")
  assert workdir.git_commit() is None
