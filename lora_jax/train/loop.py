"""The training loop: steps, evaluations, checkpoints, and going on again.

A run is a pure function of its config: the batch of a step, the dropout of a
token and the learning rate depend on (seed, step) alone. Whatever is killed
goes on from the newest sound checkpoint and ends with the same bytes.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
import dataclasses
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
from lora_jax.train import record as record_lib
from lora_jax.train import sinks as sinks_lib
from lora_jax.train import step as step_lib

TrainConfig = record_lib.TrainConfig
Progress = record_lib.Progress


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
  """The mutable side of `fit`: the queue of metrics, the clock."""

  def __init__(self, task, config, folder):
    self.task, self.config, self.folder = task, config, folder
    self.line = progress_lib.Progress(config.steps, config.log_every)
    self.record = record_lib.Record(
        config, folder, task.learning_rates, task.batches.row_indices,
        task.sinks, self.line.note)
    # Metrics of steps that the device may still be working on.
    self.pending: collections.deque = collections.deque()
    self.compiles = compiles_lib.CompileClock()
    self.program = program_lib.Program(task, self.line.note)

  @property
  def progress(self):
    return self.record.progress

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
      self.record.progress = Progress.from_meta(meta)
      self.line.note(f"going on from step {self.progress.step}")
    self.began = time.monotonic() - self.progress.seconds
    self.record.open(self.progress.step if restored is not None else -1)
    try:
      state = self.program.choose(state, self.progress.step)
      if restored is None:
        self._evaluate(state.params, 0)
        self._sample(state.params, 0)
      stopped = self.record.stale()
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
      self.record.close()
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
    now = self._now()
    speed = metrics["tokens"] / max(now - self.clock, 1e-9)
    self.clock = now
    self.record.step(number, metrics, speed)
    self.line.update(number, metrics["loss"], speed)

  def _stands_still(self, number):
    """Whether there is something to do with the state after a step."""
    config = self.config
    return (config.due(config.eval_every, number)
            or config.due(config.checkpoint_every, number)
            or self.program.due())

  def _after(self, state, number, checkpoints):
    config = self.config
    if self.pending:
      return False
    stopped = False
    if config.due(config.eval_every, number):
      self._evaluate(state.params, number)
      stopped = self.record.stale()
      if number == config.steps or stopped:
        self._sample(state.params, number)
    if config.due(config.checkpoint_every, number) or stopped:
      self.progress.seconds = time.monotonic() - self.began
      self.record.sync()
      checkpoints.save(
          number, state,
          self.progress.meta() | {"base_digest": self.task.base_digest},
          self.progress.best_step)
    self.program.keep(state, number)
    self.clock = self._now()
    return stopped

  def _evaluate(self, params, number):
    if self.task.evaluate is None:
      return
    rows = self.task.evaluate(params, self.program.base)
    best = self.record.evaluation(rows, number)
    if best and self.task.save_best is not None:
      self.task.save_best(params, self.program.base, number)

  def _sample(self, params, number):
    if self.task.sample is not None:
      self.record.samples(self.task.sample(params, self.program.base), number)
