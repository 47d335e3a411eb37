"""What a run writes down while it trains: metrics, evaluations, samples.

`train.loop` keeps one, of its run; `train.members` one of each member, with the
same files as if it had been alone.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import math
import pathlib
from typing import Any

import numpy as np

from lora_jax import errors
from lora_jax.train import sinks as sinks_lib
from lora_jax.train import workdir as workdir_lib


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """The `train` block of a config.

  Attributes:
    steps: optimisation steps.
    batch_size: rows of a micro-batch.
    accumulation: micro-batches of a step.
    log_every: steps between lines of `metrics.jsonl`.
    eval_every: steps between evaluations; 0 is at the start and end only.
    checkpoint_every: steps between checkpoints; 0 is at the end only.
    patience: evaluations without a new best before stopping early; 0 is off.
    keep: how many of the newest checkpoints are kept, beside the best.
    neftune_noise_alpha: of NEFTune (arXiv 2310.05914; 5 to 15 there); 0 is off.
  """

  steps: int = 100
  batch_size: int = 4
  accumulation: int = 1
  log_every: int = 1
  eval_every: int = 0
  checkpoint_every: int = 0
  patience: int = 0
  keep: int = 2
  neftune_noise_alpha: float = 0.0

  def validate(self) -> TrainConfig:
    """Returns itself; raises `errors.UsageError` on a bad value."""
    for name, least in {"steps": 0, "batch_size": 1, "accumulation": 1,
                        "log_every": 1, "eval_every": 0, "patience": 0,
                        "checkpoint_every": 0, "keep": 1}.items():
      value = getattr(self, name)
      if not isinstance(value, int) or value < least:
        raise errors.UsageError(
            f"train.{name}={value} is out of range; use an integer of at "
            f"least {least}")
    if not 0 <= self.neftune_noise_alpha < math.inf:
      raise errors.UsageError(
          f"train.neftune_noise_alpha={self.neftune_noise_alpha} is out of "
          "range; use 0 (off) or a positive number, e.g. 5")
    return self

  def due(self, every: int, number: int) -> bool:
    """Whether what happens `every` so many steps happens after `number`."""
    return number == self.steps or bool(every and number % every == 0)


@dataclasses.dataclass
class Progress:
  """What a checkpoint keeps beside arrays: a JSON value."""

  step: int = 0
  tokens: int = 0
  seconds: float = 0.0
  best_step: int | None = None
  best_loss: float = float("inf")
  stale: int = 0
  samples: dict[str, list[str]] = dataclasses.field(default_factory=dict)

  def meta(self) -> dict[str, Any]:
    value = dataclasses.asdict(self)
    value["best_loss"] = None if self.best_step is None else self.best_loss
    return value

  @classmethod
  def from_meta(cls, meta: dict[str, Any]) -> Progress:
    if meta["best_loss"] is None:
      meta = meta | {"best_loss": float("inf")}
    return cls(**meta)


class Record:
  """The files of one run, and how far it has come.

  Attributes:
    config: how long, how often.
    folder: the work directory.
    progress: of the run.
    note: is told, in a line, what happened.
  """

  def __init__(
      self, config: TrainConfig, folder: pathlib.Path,
      learning_rates: np.ndarray, row_indices: Callable[[int], Any],
      sinks: sinks_lib.Sinks, note: Callable[[str], None]):
    """Of a run that has not begun.

    Args:
      config: how long, how often.
      folder: the work directory.
      learning_rates: `[steps]`.
      row_indices: of a step, counted from 0.
      sinks: where metrics go beside `metrics.jsonl`.
      note: see `Record`.
    """
    self.config, self.folder, self.note = config, folder, note
    self.progress = Progress()
    self._learning_rates, self._row_indices = learning_rates, row_indices
    self._sinks = sinks
    self._metrics: Any = None

  def open(self, before: int) -> None:
    """Opens the files, without what they hold of steps after `before`."""
    self._metrics = workdir_lib.metrics(
        self.folder / "metrics.jsonl", before)
    self._sinks.start(self.folder, before)

  def sync(self) -> None:
    """Waits for the disk; see `workdir.Metrics.sync`."""
    self._metrics.sync()

  def close(self) -> None:
    if self._metrics is not None:
      self._metrics.close()

  def step(self, number: int, metrics: dict[str, Any], speed: float) -> None:
    """Notes a step.

    Args:
      number: of the step, from 1.
      metrics: Python values of what `step.train_step` returned.
      speed: tokens a second.

    Raises:
      errors.UserError: if it was not finite; its rows are in
        `nonfinite.json` then.
    """
    if not metrics["finite"]:
      self._stop_nonfinite(number, metrics)
    self.progress.step = number
    self.progress.tokens += metrics["tokens"]
    if not self.config.due(self.config.log_every, number):
      return
    self._write({
        "step": number, "loss": _finite(metrics["loss"]),
        "grad_norm": _finite(metrics["grad_norm"]),
        "lr": float(self._learning_rates[number - 1]),
        "tokens": self.progress.tokens, "tokens_per_s": round(speed, 1)}
        | {k: metrics[k] for k in ("loss_scale", "skipped") if k in metrics}
        | {k: _finite(metrics[k]) for k in ("penalty",) if k in metrics})

  def evaluation(self, rows: Any, number: int) -> bool:
    """Notes row losses after a step; returns whether they are the best.

    Raises:
      errors.UserError: if the loss is not finite.
    """
    if not math.isfinite(rows.loss):
      raise errors.UserError(
          f"step {number}: the held-out loss is {rows.loss}, not finite; "
          + ("lower optim.learning_rate (earlier checkpoints are intact)"
             if number else "look at the weights of model.path, or use "
             "compute.dtype=float32"))
    save_rows(self.folder, number, rows)
    self._write({"step": number, "eval_loss": rows.loss,
                 "perplexity": rows.perplexity})
    self.note(f"step {number}/{self.config.steps}  held-out loss "
              f"{rows.loss:.4f}  perplexity {rows.perplexity:.3f}")
    progress = self.progress
    if rows.loss < progress.best_loss:
      progress.best_loss, progress.best_step = rows.loss, number
      progress.stale = 0
      return True
    progress.stale += 1
    return False

  def stale(self) -> bool:
    """Whether there were so many evaluations without a best that it stops."""
    return 0 < self.config.patience <= self.progress.stale

  def samples(self, texts: list[str], number: int) -> None:
    """Notes texts that were generated after a step."""
    self.progress.samples[str(number)] = texts
    self._sinks.text(number, texts)

  def _write(self, values):
    self._metrics.write(values)
    self._sinks.scalars(values["step"], {
        k: v for k, v in values.items() if k != "step" and v is not None})

  def _stop_nonfinite(self, number, metrics):
    rows = np.asarray(self._row_indices(number - 1)).tolist()
    path = self.folder / "nonfinite.json"
    workdir_lib.write_json(path, {
        "step": number, "loss": repr(metrics["loss"]),
        "grad_norm": repr(metrics["grad_norm"]), "rows": rows})
    raise errors.UserError(
        f"step {number}: loss={metrics['loss']}, "
        f"grad_norm={metrics['grad_norm']} is not finite; its {len(rows)} "
        f"rows are in {path}; "
        + ("no loss scale helps; use compute.dtype=bfloat16 or float32, "
           if "loss_scale" in metrics else "")
        + "lower optim.learning_rate or look at the rows "
        "(earlier checkpoints are intact)")


def _finite(value: float) -> float | None:
  """None, which JSON can hold, for what a skipped float16 step has."""
  return value if math.isfinite(value) else None


def save_rows(folder: pathlib.Path, number: int, rows: Any) -> None:
  """Keeps an evaluation's row losses as `evals/<step>.json`."""
  workdir_lib.write_json(folder / "evals" / f"{number}.json", {
      "nll": rows.nll.tolist(), "weight": rows.weight.tolist()})
