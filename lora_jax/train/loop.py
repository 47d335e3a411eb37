"""The training loop: steps, evaluations, checkpoints, and going on again.

A run is a pure function of its config: the batch of a step, the dropout of a
token and the learning rate depend on (seed, step) alone. Whatever is killed
goes on from the newest sound checkpoint and ends with the same bytes.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
import dataclasses
import math
import pathlib
import time
from typing import Any, Protocol

import jax
import numpy as np

from lora_jax import errors
from lora_jax import types
from lora_jax.models import config as config_lib
from lora_jax.train import checkpoint as checkpoint_lib
from lora_jax.train import compiles as compiles_lib
from lora_jax.train import memory as memory_lib
from lora_jax.train import optim as optim_lib
from lora_jax.train import program as program_lib
from lora_jax.train import progress as progress_lib
from lora_jax.train import sinks as sinks_lib
from lora_jax.train import step as step_lib
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
  """

  steps: int = 100
  batch_size: int = 4
  accumulation: int = 1
  log_every: int = 1
  eval_every: int = 0
  checkpoint_every: int = 0
  patience: int = 0
  keep: int = 2

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
    return self


class Batches(Protocol):
  """Where batches come from; a pure function of the step."""

  def batch(self, step: int) -> types.Batch: ...

  def row_indices(self, step: int) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Task:
  """What is trained, on what.

  Attributes:
    model: the architecture.
    base: the frozen base.
    frozen: the frozen part of the adapters.
    batches: source of training batches `[a, b, t]`.
    learning_rates: `[steps]`.
    optim: the other hyperparameters.
    settings: static choices of the step.
    key: PRNG key of the run.
    place: puts a batch on the devices.
    evaluate: `(params, base)` -> row losses (`.loss`, `.perplexity`), or None.
    sample: `(params, base)` -> texts, or None.
    save_best: `(params, base, step)`, called whenever an evaluation is the
      best.
    sinks: where metrics go beside `metrics.jsonl`; whoever made them finishes
      them.
    base_digest: of base weights that were replaced at the start (see
      `adapters.starts`), or None. Checkpoints do not hold them: whoever goes
      on must have come to the same.
    memory: how a step is made to fit.
    donate: whether `base` may be moved to host memory to that end: whoever
      else holds it holds nothing then. Callbacks get the base that there is.
  """

  model: config_lib.ModelConfig
  base: types.Tree
  frozen: types.Tree
  batches: Batches
  learning_rates: np.ndarray
  optim: optim_lib.OptimConfig
  settings: step_lib.Settings
  key: jax.Array
  place: Callable[[types.Batch], types.Batch] = lambda batch: batch
  evaluate: Callable[[types.Tree, types.Tree], Any] | None = None
  sample: Callable[[types.Tree, types.Tree], list[str]] | None = None
  save_best: Callable[[types.Tree, types.Tree, int], None] | None = None
  sinks: sinks_lib.Sinks = dataclasses.field(default_factory=sinks_lib.Sinks)
  base_digest: str | None = None
  memory: memory_lib.MemoryConfig = dataclasses.field(
      default_factory=memory_lib.MemoryConfig)
  donate: bool = False


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


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What `fit` returns; `base` in whichever memory it ended up."""

  state: step_lib.TrainState
  base: types.Tree
  progress: Progress
  compile_seconds: float
  compiles: int
  stopped_early: bool
  plan: memory_lib.Plan | None = None


def fit(
    task: Task,
    state: step_lib.TrainState,
    config: TrainConfig,
    folder: pathlib.Path,
) -> Outcome:
  """Trains from `state`, or from the newest checkpoint in `folder`.

  Args:
    task: what is trained.
    state: the state before the first step; donated.
    config: how long, how often.
    folder: the work directory.

  Returns:
    The final state and what happened.

  Raises:
    errors.UserError: if the loss is no longer finite (the step and its rows
      are in `nonfinite.json`), the disk is full, or the device's memory is,
      for the second time.
  """
  return _Run(task, config, folder).run(state)


class _Run:
  """The mutable side of `fit`: files, counters, the queue of metrics."""

  def __init__(self, task, config, folder):
    self.task, self.config, self.folder = task, config, folder
    self.progress = Progress()
    self.line = progress_lib.Progress(config.steps, config.log_every)
    # Metrics of steps that the device may still be working on.
    self.pending: collections.deque = collections.deque()
    self.compiles = compiles_lib.CompileClock()
    self.program = program_lib.Program(task, self.line.note)

  def run(self, state):
    with self.compiles:
      try:
        return self._run(state)
      except jax.errors.JaxRuntimeError as error:
        if not program_lib.out_of_memory(error):
          raise
        raise self.program.complaint(str(error)) from error

  def _run(self, state):
    checkpoints = checkpoint_lib.Checkpoints(
        self.folder / "checkpoints", self.config.keep)
    restored = checkpoints.restore(state)
    if restored is not None:
      state, meta = restored
      self._same_base(meta.pop("base_digest", None))
      self.progress = Progress.from_meta(meta)
      self.line.note(f"going on from step {self.progress.step}")
    self.began = time.monotonic() - self.progress.seconds
    before = self.progress.step if restored is not None else -1
    self.metrics = workdir_lib.metrics(self.folder / "metrics.jsonl", before)
    self.task.sinks.start(self.folder, before)
    try:
      state = self.program.choose(state, self.progress.step)
      if restored is None:
        self._evaluate(state.params, 0)
        self._sample(state.params, 0)
      stopped = self._stale()
      self.clock = self._now()
      i = self.progress.step
      self.program.keep(state, i)
      while i < self.config.steps and not stopped:
        done = self._step(state, i)
        if isinstance(done, str):
          del state  # What may be left of it is in the way.
          state, i = self.program.shrink(done)
          self.clock = self._now()
          continue
        state, i = done, i + 1
        stopped = self._after(state, i, checkpoints)
      if not self.config.steps:  # There was no checkpoint to note it.
        self.progress.seconds = time.monotonic() - self.began
      return Outcome(
          state, self.program.base, self.progress, self.compiles.seconds,
          self.compiles.count, stopped, self.program.plan)
    finally:
      self.metrics.close()
      checkpoints.close()

  def _same_base(self, was):
    now = self.task.base_digest
    if was != now:
      raise errors.UserError(
          f"{self.folder}: its checkpoints were trained beside base weights "
          f"with digest {str(was)[:12]}, this run's have {str(now)[:12]}; go "
          "on with the same adapter.init and model, on the same kind of "
          "machine, or choose another --workdir")

  def _now(self):
    """Time without compilation, which is no part of the speed."""
    return time.monotonic() - self.compiles.seconds

  def _step(self, state, i):
    """The next state, or what XLA said if there was no memory for it."""
    try:
      state, metrics = self.program.step(state, i)
      self.pending.append((i + 1, metrics))
      # One step in flight: the host prepares the next batch meanwhile. None
      # where the run stands still, so that no failed step is left behind.
      while len(self.pending) > (0 if self._stands_still(i + 1) else 1):
        self._drain_one()
    except jax.errors.JaxRuntimeError as error:
      if not program_lib.out_of_memory(error):
        raise
      self.pending.clear()
      return str(error)
    return state

  def _drain_one(self):
    number, metrics = self.pending.popleft()
    metrics = {k: v.item() for k, v in jax.device_get(metrics).items()}
    if number <= self.progress.step:
      return  # Computed again, and told before.
    if not metrics["finite"]:
      self._stop_nonfinite(number, metrics)
    self.progress.step = number
    self.progress.tokens += metrics["tokens"]
    now = self._now()
    speed = metrics["tokens"] / max(now - self.clock, 1e-9)
    self.clock = now
    self.line.update(number, metrics["loss"], speed)
    if number % self.config.log_every == 0 or number == self.config.steps:
      self._write({
          "step": number, "loss": _finite(metrics["loss"]),
          "grad_norm": _finite(metrics["grad_norm"]),
          "lr": float(self.task.learning_rates[number - 1]),
          "tokens": self.progress.tokens, "tokens_per_s": round(speed, 1)}
          | {k: metrics[k] for k in ("loss_scale", "skipped") if k in metrics}
          | {k: _finite(metrics[k]) for k in ("penalty",) if k in metrics})

  def _write(self, values):
    self.metrics.write(values)
    self.task.sinks.scalars(values["step"], {
        k: v for k, v in values.items() if k != "step" and v is not None})

  def _stop_nonfinite(self, number, metrics):
    rows = np.asarray(self.task.batches.row_indices(number - 1)).tolist()
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

  def _due(self, every, number):
    return number == self.config.steps or (every and number % every == 0)

  def _stands_still(self, number):
    """Whether there is something to do with the state after a step."""
    return (self._due(self.config.eval_every, number)
            or self._due(self.config.checkpoint_every, number)
            or self.program.due())

  def _after(self, state, number, checkpoints):
    config = self.config
    if self.pending:
      return False
    stopped = False
    if self._due(config.eval_every, number):
      self._evaluate(state.params, number)
      stopped = self._stale()
      if number == config.steps or stopped:
        self._sample(state.params, number)
    if self._due(config.checkpoint_every, number) or stopped:
      self.progress.seconds = time.monotonic() - self.began
      self.metrics.sync()
      checkpoints.save(
          number, state,
          self.progress.meta() | {"base_digest": self.task.base_digest},
          self.progress.best_step)
    self.program.keep(state, number)
    self.clock = self._now()
    return stopped

  def _stale(self):
    return 0 < self.config.patience <= self.progress.stale

  def _evaluate(self, params, number):
    if self.task.evaluate is None:
      return
    rows = self.task.evaluate(params, self.program.base)
    if not math.isfinite(rows.loss):
      raise errors.UserError(
          f"step {number}: the held-out loss is {rows.loss}, not finite; "
          + ("lower optim.learning_rate (earlier checkpoints are intact)"
             if number else "look at the weights of model.path, or use "
             "compute.dtype=float32"))
    save_rows(self.folder, number, rows)
    self._write({"step": number, "eval_loss": rows.loss,
                 "perplexity": rows.perplexity})
    self.line.note(f"step {number}/{self.config.steps}  held-out loss "
                   f"{rows.loss:.4f}  perplexity {rows.perplexity:.3f}")
    progress = self.progress
    if rows.loss < progress.best_loss:
      progress.best_loss, progress.best_step = rows.loss, number
      progress.stale = 0
      if self.task.save_best is not None:
        self.task.save_best(params, self.program.base, number)
    else:
      progress.stale += 1

  def _sample(self, params, number):
    if self.task.sample is not None:
      texts = self.progress.samples[str(number)] = self.task.sample(
          params, self.program.base)
      self.task.sinks.text(number, texts)


def _finite(value: float) -> float | None:
  """None, which JSON can hold, for what a skipped float16 step has."""
  return value if math.isfinite(value) else None


def save_rows(folder: pathlib.Path, number: int, rows: Any) -> None:
  """Keeps an evaluation's row losses as `evals/<step>.json`."""
  workdir_lib.write_json(folder / "evals" / f"{number}.json", {
      "nll": rows.nll.tolist(), "weight": rows.weight.tolist()})
