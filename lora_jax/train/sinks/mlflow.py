"""MLflow: a tracking server, or a local SQLite store.

  pip install lora_jax[mlflow]
  mlflow ui --backend-store-uri sqlite:///runs/mlflow.db   # needs all of mlflow

The run's id is kept in `<workdir>/sinks/mlflow.json`. MLflow keeps every
value of a metric, also two of one step: when a run goes on, the store is
asked for the last step of each and nothing up to there is sent again.
"""

from __future__ import annotations

import logging
import os
import time
from typing import Any

from lora_jax.train.sinks import base

# MLflow's limits for a batch and for a parameter's text.
BATCH, LENGTH = 100, 6000


class MLflow:
  """A `base.Sink`."""

  def __init__(self, log: base.LogConfig):
    self._log = log
    self._last: dict[str, int] = {}

  def start(self, config, folder, resumed_step):
    # Creating a database is reported table by table.
    for name in ("mlflow", "alembic"):
      logging.getLogger(name).setLevel(logging.WARNING)
    from mlflow import entities
    from mlflow import tracking

    self._entities = entities
    local = folder.absolute().parent
    uri = (self._log.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI")
           or f"sqlite:///{local / 'mlflow.db'}")
    self._client: Any = tracking.MlflowClient(tracking_uri=uri)
    state = base.recall(folder, "mlflow")
    if state.get("uri") == uri:
      self._id = state["run_id"]
      self._client.update_run(self._id, status="RUNNING")
      for key in self._client.get_run(self._id).data.metrics:
        history = self._client.get_metric_history(self._id, key)
        self._last[key] = max(metric.step for metric in history)
      return
    # A store of files would put the artifacts under the current folder.
    place = (local / "mlflow-artifacts").as_uri() if "sqlite:" in uri else None
    self._id = self._client.create_run(
        self._experiment(place), run_name=self._log.run_name(folder),
        tags={"workdir": str(folder.absolute())}).info.run_id
    base.remember(folder, "mlflow", {"uri": uri, "run_id": self._id})
    params = [entities.Param(key, str(value)[:LENGTH])
              for key, value in base.flat(config)]
    for i in range(0, len(params), BATCH):
      self._client.log_batch(self._id, params=params[i:i + BATCH])
    self._client.log_dict(self._id, dict(config), "config.json")

  def scalars(self, step, values):
    now = int(time.time() * 1000)
    self._client.log_batch(self._id, metrics=[
        self._entities.Metric(key, float(value), now, step)
        for key, value in values.items() if step > self._last.get(key, -1)])

  def text(self, step, samples):
    self._client.log_text(
        self._id, "\n\n---\n\n".join(samples), f"samples/{step:06}.md")

  def finish(self, summary):
    if summary is not None:
      self._client.log_dict(self._id, dict(summary), "summary.json")
      self.scalars(summary.get("steps", 0), {
          f"summary/{key}": value for key, value in base.flat(summary)
          if isinstance(value, int | float)})
    self._client.set_terminated(
        self._id, "FINISHED" if summary is not None else "FAILED")

  def _experiment(self, place):
    from mlflow import exceptions

    found = self._client.get_experiment_by_name(self._log.project)
    if found is not None:
      return found.experiment_id
    try:
      return self._client.create_experiment(
          self._log.project, artifact_location=place)
    except exceptions.MlflowException:  # Another run was a moment earlier.
      return self._client.get_experiment_by_name(
          self._log.project).experiment_id
