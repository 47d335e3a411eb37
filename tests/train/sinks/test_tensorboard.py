"""Event files, read back by TensorBoard."""

from __future__ import annotations

import json

import pytest

from lora_jax.train import sinks
from tests.train.sinks import test_fan

pytest.importorskip("tensorboardX")
accumulator = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator")

LOG = sinks.LogConfig(sinks="tensorboard", timeout=60.0)


def _read(folder):
  found = accumulator.EventAccumulator(
      str(folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
  return found.Reload()


def _texts(events, tag):
  return [(e.step, e.tensor_proto.string_val[0].decode())
          for e in events.Tensors(f"{tag}/text_summary")]


def test_a_killed_run_has_every_step_once(tmp_path, monkeypatch):
  test_fan.killed_then_resumed(tmp_path / "run", LOG, monkeypatch)
  assert len(list((tmp_path / "run/tensorboard").iterdir())) == 2
  events = _read(tmp_path / "run")
  scalars = lambda tag: [(e.step, e.value) for e in events.Scalars(tag)]
  assert scalars("loss") == [
      (i, pytest.approx(1 / i)) for i in range(1, 9)]
  assert scalars("lr") == [(i, 0.5) for i in range(1, 9)]
  assert scalars("eval_loss") == [(i, 1.5) for i in (0, 2, 4, 6, 8)]
  assert scalars("perplexity") == [(i, 7.0) for i in (0, 2, 4, 6, 8)]
  assert len(scalars("tokens_per_s")) == 8
  assert _texts(events, "samples/2") == [(0, "two"), (8, "two")]
  ((_, config),) = _texts(events, "config")
  assert json.loads(config.strip("`").removeprefix("json")) == {
      "train": {"steps": 8}, "seed": 3}
  ((step, summary),) = _texts(events, "summary")
  assert step == 8 and '"loss": 0.25' in summary
  # The same command on a finished run adds nothing.
  test_fan.fit(tmp_path / "run", LOG, steps=8,
               monkeypatch=monkeypatch)
  events = _read(tmp_path / "run")
  assert len(events.Scalars("loss")) == 8
  assert len(_texts(events, "summary")) == 1
