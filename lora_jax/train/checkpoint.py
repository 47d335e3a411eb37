"""Checkpoints: orbax, with a digest of every file beside each.

Orbax makes a step's folder appear whole or not at all, but not proof against
a disk that lost the end of a file afterwards. `checkpoints/sha256/<step>.json`
holds the digests of a finished step; a step that does not match is moved
aside with a warning and the one before it is used.

A step may be restored onto other devices than it was saved on. Several
processes write their own parts into one folder, which all of them must see;
what orbax does not do, one of them does.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
import shutil
from typing import Any

from absl import logging
import jax
import orbax.checkpoint as ocp

from lora_jax import errors
from lora_jax import processes
from lora_jax import types
from lora_jax.train import workdir as workdir_lib


class Checkpoints:
  """The `checkpoints/` folder of a work directory.

  Keeps the newest `keep` steps and the best one.
  """

  def __init__(self, folder: pathlib.Path, keep: int = 2):
    self._folder = folder.absolute()
    self._digests = self._folder / "sha256"
    self._keep = keep
    if processes.writes():
      self._digests.mkdir(parents=True, exist_ok=True)
      self._set_damaged_aside()
    processes.barrier("checkpoints are sound")
    self._manager = ocp.CheckpointManager(
        self._folder, options=ocp.CheckpointManagerOptions(
            enable_async_checkpointing=False))

  def steps(self) -> list[int]:
    return sorted(self._manager.all_steps())

  def save(
      self, step: int, state: types.Tree, meta: dict[str, Any],
      best_step: int | None = None
  ) -> None:
    """Writes `state` and the JSON value `meta`; drops what is not kept.

    Raises:
      errors.UserError: if the disk is full or not writable; the steps saved
        before stay as they are.
    """
    try:
      with _quiet():
        self._manager.save(step, args=ocp.args.Composite(
            state=ocp.args.StandardSave(_present(state)),
            meta=ocp.args.JsonSave(meta)))
        self._manager.wait_until_finished()
    except Exception as error:
      reason = (str(error).splitlines() or [type(error).__name__])[0]
      raise errors.UserError(
          f"checkpoint of step {step} could not be written to "
          f"{self._folder}: {reason}; free space or choose another "
          "--workdir, then run the same command again") from error
    if processes.writes():
      workdir_lib.write_json(
          self._digests / f"{step}.json", _digest(self._folder / str(step)))
    for old in self.steps()[:-self._keep]:
      if old != best_step:
        self._manager.delete(old)
        if processes.writes():
          (self._digests / f"{old}.json").unlink(missing_ok=True)

  def restore(
      self, like: types.Tree
  ) -> tuple[types.Tree, dict[str, Any]] | None:
    """(state, meta) of the newest sound step, or None without one.

    Args:
      like: a tree of arrays with the state's structure and shardings.
    """
    steps = self.steps()
    if not steps:
      return None
    target = jax.tree.map(
        ocp.utils.to_shape_dtype_struct, _present(like))
    restored = self._manager.restore(steps[-1], args=ocp.args.Composite(
        state=ocp.args.StandardRestore(target), meta=ocp.args.JsonRestore()))
    state = restored["state"]
    if dataclasses.is_dataclass(like):
      state = dataclasses.replace(like, **state)  # type: ignore[type-var]
    return state, restored["meta"]

  def close(self) -> None:
    self._manager.close()

  def _set_damaged_aside(self) -> None:
    for path in sorted(self._folder.glob("[0-9]*")):
      if not path.name.isdigit():  # A kill came while orbax was writing.
        shutil.rmtree(path)
        continue
      digests = self._digests / f"{path.name}.json"
      if digests.exists() and _digest(path) == _read(digests):
        continue
      aside = self._folder / f"damaged-{path.name}"
      for i in range(1, 1000):
        if not aside.exists():
          break
        aside = self._folder / f"damaged-{path.name}.{i}"
      path.rename(aside)
      digests.unlink(missing_ok=True)
      logging.warning(
          "checkpoint %s is damaged or unfinished: moved to %s; the newest "
          "sound one is used", path, aside.name)


def _present(state: types.Tree) -> types.Tree:
  """A dataclass by field, without those that are None.

  A field that a later version adds is then no reason not to read what an
  earlier one has written.
  """
  if not dataclasses.is_dataclass(state):
    return state
  fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
  return {name: value for name, value in fields.items() if value is not None}


@functools.cache
def _hush_threads() -> None:
  """Several of its threads may fail on a full disk: one's error is raised,
  and the others print theirs whenever they come to it."""
  logging.get_absl_logger().addFilter(
      lambda record: "_SignalingThread" not in str(record.msg))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Without orbax's log: it prints a traceback of errors it raises, too."""
  _hush_threads()
  before = logging.get_verbosity()
  logging.set_verbosity(logging.FATAL)
  try:
    yield
  finally:
    logging.set_verbosity(before)


def _read(path: pathlib.Path) -> Any:
  try:
    return json.loads(path.read_text())
  except ValueError:
    return None


def _digest(folder: pathlib.Path) -> dict[str, str]:
  return {
      str(path.relative_to(folder)):
          hashlib.sha256(path.read_bytes()).hexdigest()
      for path in sorted(folder.rglob("*")) if path.is_file()}
