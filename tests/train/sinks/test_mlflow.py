"""A local MLflow store, read back by MLflow's client."""

from __future__ import annotations

import json

import pytest

from lora_jax.train import sinks
from tests.train.sinks import test_fan

pytest.importorskip("mlflow")
pytest.importorskip("sqlalchemy")

LOG = sinks.LogConfig(sinks="mlflow", timeout=60.0)


def test_a_killed_run_has_every_step_once(tmp_path, monkeypatch):
  from mlflow import tracking

  monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
  test_fan.killed_then_resumed(tmp_path / "run", LOG, monkeypatch)
  client = tracking.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
  experiment = client.get_experiment_by_name("lora_jax")
  (run,) = client.search_runs([experiment.experiment_id])
  assert run.info.run_name == "run"
  assert run.info.status == "FINISHED"
  assert run.data.params == {"train.steps": "8", "seed": "3"}

  def history(key):
    values = client.get_metric_history(run.info.run_id, key)
    return sorted((m.step, m.value) for m in values)

  assert history("loss") == [(i, pytest.approx(1 / i)) for i in range(1, 9)]
  assert history("eval_loss") == [(i, 1.5) for i in (0, 2, 4, 6, 8)]
  assert len(history("tokens_per_s")) == 8
  assert history("summary/loss") == [(8, 0.25)]
  files = {p.name: p.read_text()
           for p in (tmp_path / "mlflow-artifacts").rglob("*") if p.is_file()}
  assert files.keys() == {
      "config.json", "summary.json", "000000.md", "000008.md"}
  assert files["000008.md"].split() == ["one", "---", "two"]
  assert json.loads(files["summary.json"])["loss"] == 0.25
