"""All sinks of a run, none of which can stop it or slow it down.

Each has a thread and a queue: the loop puts a record there and goes on. A
sink that raises, that falls behind by `CAPACITY` records or that does not
finish in time is dropped with one warning. What the run writes itself
(`metrics.jsonl` and the rest) knows nothing of sinks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import pathlib
import queue
import threading
import time
from typing import Any

from absl import logging
import jax

from lora_jax.train.sinks import base
from lora_jax.train.sinks import registry

CAPACITY = 10_000


class Sinks:
  """The sinks of a `log` block; a context manager that closes them.

    with Sinks(LogConfig(sinks="tensorboard"), config) as sinks:
      model, outcome = model.train(rows, workdir=folder, sinks=sinks)
      sinks.finish({"loss": outcome.progress.best_loss})
  """

  def __init__(
      self, log: base.LogConfig | None = None,
      config: Mapping[str, Any] | None = None):
    """Opens nothing yet.

    Args:
      log: which sinks.
      config: what they show as the run's hyperparameters.

    Raises:
      errors.UsageError: for an unknown sink or a bad value.
    """
    self._log = (log or base.LogConfig()).validate()
    self._config = config or {}
    self._workers: list[_Worker] = []

  def start(self, folder: pathlib.Path, resumed_step: int) -> None:
    """Opens all of them, in their threads; on the first process only."""
    if jax.process_index() == 0:
      self._workers = [_Worker(name, self._log) for name in self._log.names]
    self._send("start", self._config, folder, resumed_step)

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    self._send("scalars", step, dict(values))

  def text(self, step: int, samples: Sequence[str]) -> None:
    self._send("text", step, list(samples))

  def finish(self, summary: Mapping[str, Any] | None) -> None:
    """Closes them and waits, at most `log.timeout` seconds for all."""
    workers, self._workers = self._workers, []
    for worker in workers:
      worker.send("finish", summary)
      worker.close()
    deadline = time.monotonic() + self._log.timeout
    for worker in workers:
      worker.join(max(0.0, deadline - time.monotonic()))

  def __enter__(self) -> Sinks:
    return self

  def __exit__(self, kind, error, trace) -> None:
    # What is still open here has had no summary: the run has failed.
    self.finish(None)

  def _send(self, method: str, *args) -> None:
    for worker in self._workers:
      worker.send(method, *args)


class _Worker:
  """A sink, its thread and its queue."""

  def __init__(self, name: str, log: base.LogConfig):
    self._name, self._log = name, log
    self._dropped = threading.Event()
    self._queue: queue.Queue = queue.Queue(CAPACITY)
    # A daemon: a connection that hangs must not keep the process alive.
    self._thread = threading.Thread(
        target=self._run, name=f"sink-{name}", daemon=True)
    self._thread.start()

  def send(self, method: str, *args) -> None:
    if not self._dropped.is_set():
      try:
        self._queue.put_nowait((method, args))
      except queue.Full:
        self._drop(f"it is {CAPACITY:,} records behind")

  def close(self) -> None:
    if not self._dropped.is_set():
      self.send("", None)

  def join(self, seconds: float) -> None:
    self._thread.join(0 if self._dropped.is_set() else seconds)
    if self._thread.is_alive() and not self._dropped.is_set():
      self._drop(f"it did not finish within log.timeout={self._log.timeout:g} "
                 "seconds")

  def _run(self) -> None:
    try:
      sink: Any = registry.SINKS[self._name](self._log)
      while not self._dropped.is_set():
        method, args = self._queue.get()
        if not method:
          return
        call: Callable = getattr(sink, method)
        call(*args)
    # Clients leave by SystemExit, too; nothing of theirs concerns the run.
    except BaseException as error:
      reason = (str(error).splitlines() or [""])[0]
      self._drop(f"{type(error).__name__}: {reason}")

  def _drop(self, reason: str) -> None:
    if not self._dropped.is_set():
      self._dropped.set()
      logging.warning(
          "log.sinks: %s is dropped (%s); the run goes on and its own files "
          "are complete", self._name, reason)
