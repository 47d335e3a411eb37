"""Weights & Biases, online or offline.

  pip install lora_jax[wandb]
  wandb login                          # online
  wandb sync <workdir>/wandb/offline-* # offline, in the order of the names

The run's id is drawn at the start and kept in `<workdir>/sinks/wandb.json`:
a run that goes on is the same run there. W&B has no way back to an earlier
step; what was sent before the run was killed is not sent again (it would be
the same, since a run is a function of its config).
"""

from __future__ import annotations

import os
from typing import Any

from lora_jax.train.sinks import base


class WandB:
  """A `base.Sink`."""

  def __init__(self, log: base.LogConfig):
    self._log = log
    self._last = self._kept = -1

  def start(self, config, folder, resumed_step):
    import wandb

    if self._log.wandb_mode == "online" and not wandb.login(prompt=False):
      raise RuntimeError(
          "no credentials; run `wandb login`, set WANDB_API_KEY, or use "
          "log.wandb_mode=offline")
    self._wandb, self._folder = wandb, folder
    self._state = base.recall(folder, "wandb")
    self._state.setdefault("id", os.urandom(4).hex())
    self._state.setdefault("step", -1)
    self._kept = self._last = self._state["step"]
    base.remember(folder, "wandb", self._state)
    mode: Any = self._log.wandb_mode  # One of its literals: `validate`.
    self._run: Any = wandb.init(
        project=self._log.project, name=self._log.run_name(folder),
        id=self._state["id"], resume="allow", dir=str(folder),
        config=dict(config), mode=mode,
        settings=wandb.Settings(
            console="off", silent=True,
            init_timeout=max(self._log.timeout, 1)))

  def scalars(self, step, values):
    self._send(step, values)

  def text(self, step, samples):
    table = self._wandb.Table(
        columns=["sample", "text"],
        data=[[i + 1, text] for i, text in enumerate(samples)])
    self._send(step, {"samples": table})

  def finish(self, summary):
    if summary is not None:
      # Under names of their own: the last row, which W&B writes when it
      # finishes, would replace "tokens_per_s" by that of the last step.
      self._run.summary.update(
          {f"summary/{key}": value for key, value in summary.items()})
    self._run.finish(exit_code=0 if summary is not None else 1)
    self._mark(self._last)

  def _send(self, step, values):
    if step <= self._kept:
      return
    if step > self._last >= 0:
      self._mark(self._last)
    self._last = step
    self._run.log(dict(values), step=step)

  def _mark(self, step):
    """Notes the last step whose row is whole: W&B writes it with the next."""
    if step > self._state["step"]:
      self._state["step"] = step
      base.remember(self._folder, "wandb", self._state)
