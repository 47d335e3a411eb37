"""The cells of a study, and which of them are done.

  <workdir>/sweep.json           the study, its commit, its cells
  <workdir>/cells/<name>/        a cell's work directory, as of experiments.run
  <workdir>/cells/<name>/claim   who works on it
  <workdir>/cells/<name>/error   why it failed
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
import copy
import dataclasses
import json
import os
import pathlib
import runpy
import socket
import threading
import time
import traceback
from typing import Any

from lora_jax import errors
from lora_jax.train import workdir as workdir_lib

# Seconds after which a claim that nobody renews is nobody's.
STALE = 300.0
RENEWED = 30.0


@dataclasses.dataclass(frozen=True)
class Cell:
  """One run.

  Attributes:
    name: what is particular about it, `rank=8,seed=0`.
    overrides: likewise, by field.
    config: resolved.
    folder: its work directory.
  """

  name: str
  overrides: Mapping[str, Any]
  config: dict[str, Any]
  folder: pathlib.Path

  @property
  def state(self) -> str:
    """done, failed, running or open."""
    if (self.folder / "summary.json").exists():
      return "done"
    if (self.folder / "error").exists():
      return "failed"
    return "running" if _held(self.folder / "claim") else "open"

  def summary(self) -> dict[str, Any] | None:
    """Its result, if it is done."""
    path = self.folder / "summary.json"
    return json.loads(path.read_text()) if path.exists() else None

  def failed(self, error: BaseException) -> None:
    """Notes why it has no result."""
    workdir_lib.write_bytes(
        self.folder / "error",
        (f"{type(error).__name__}: {error}\n" if isinstance(
            error, errors.UserError | OSError) else
         "".join(traceback.format_exception(error))).encode())


@dataclasses.dataclass(frozen=True)
class Study:
  """A file of configs/studies/.

  Attributes:
    file: its path.
    name: without folder and ending.
    arg: what it was given.
    cells: of `sweep()`.
    claims: of `claims()`, or ().
    changes: of fields of all cells, as text.
  """

  file: pathlib.Path
  name: str
  arg: str
  cells: tuple[Cell, ...]
  claims: tuple[Any, ...] = ()
  changes: Mapping[str, str] = dataclasses.field(default_factory=dict)


def study(
    path_and_arg: str, folder: pathlib.Path,
    changes: Mapping[str, str] | None = None) -> Study:
  """Reads a study.

  Args:
    path_and_arg: `configs/studies/rank.py:runlocal`.
    folder: of the sweep.
    changes: of fields of all cells, as text.

  Raises:
    errors.UsageError: if it is no study, or a cell changes a field that does
      not exist.
  """
  file, _, arg = path_and_arg.partition(":")
  parts = runpy.run_path(file)
  if "sweep" not in parts:
    raise errors.UsageError(
        f"--config={file} has no sweep(); give a file of configs/studies/, or "
        "run it with experiments.run")
  given = (arg,) if arg else ()
  base = json.loads(parts["get_config"](*given).to_json_best_effort())
  base = _with(base, {name: _typed(base, name, text)
                      for name, text in (changes or {}).items()})
  overrides = parts["sweep"](*given)
  cells = [
      Cell(name, one, _with(base, one), folder / "cells" / name)
      for name, one in zip(names(overrides), overrides, strict=True)]
  claims = parts["claims"](*given) if "claims" in parts else ()
  return Study(pathlib.Path(file), pathlib.Path(file).stem, arg, tuple(cells),
               tuple(claims), dict(changes or {}))


def names(overrides: Sequence[Mapping[str, Any]]) -> list[str]:
  """Of cells: the fields' last names where those are different.

  Raises:
    errors.UsageError: if two cells are the same.
  """
  fields = list(dict.fromkeys(f for one in overrides for f in one))
  last = [f.rpartition(".")[2] for f in fields]
  short = {f: s if last.count(s) == 1 else f
           for f, s in zip(fields, last, strict=True)}
  found = []
  for one in overrides:
    text = ",".join(f"{short[f]}={_text(v)}" for f, v in one.items())
    found.append(text.replace("/", "_") or "base")
  doubles = sorted({n for n in found if found.count(n) > 1})
  if doubles:
    raise errors.UsageError(
        f"the study has the cell {doubles[0]} {found.count(doubles[0])} times; "
        "name each once")
  return found


def _text(value: Any) -> str:
  return f"{value:g}" if isinstance(value, float) else str(value)


def _with(base: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
  config = copy.deepcopy(base)
  for field, value in overrides.items():
    *path, last = field.split(".")
    node: Any = config
    for part in path:
      node = node.get(part) if isinstance(node, dict) else None
    if not isinstance(node, dict) or last not in node:
      raise errors.UsageError(
          f"the study's field {field} does not exist"
          f"{errors.nearest(field, _fields(config))}")
    node[last] = value
  return config


def _typed(config: dict[str, Any], field: str, text: str) -> Any:
  """The value of a field that has been given as text."""
  node: Any = config
  for part in field.split("."):
    node = node.get(part) if isinstance(node, dict) else None
  if isinstance(node, bool):
    return text == "True"
  try:
    return type(node)(text) if isinstance(node, int | float) else text
  except ValueError:
    raise errors.UsageError(
        f"--set={field}={text} is no {type(node).__name__}") from None


def _fields(config: Any, prefix: str = "") -> Iterable[str]:
  for name, value in config.items():
    if isinstance(value, dict) and value:
      yield from _fields(value, f"{prefix}{name}.")
    else:
      yield prefix + name


def _held(path: pathlib.Path) -> bool:
  try:
    return time.time() - path.stat().st_mtime < STALE
  except FileNotFoundError:
    return False


class Claim:
  """The right to run a cell, among all hosts that share the sweep's folder.

  A file that only one of them can make, and whose time it renews: whoever is
  killed loses it after `STALE` seconds.
  """

  def __init__(self, cell: Cell):
    self._path = cell.folder / "claim"
    self._own = f"{socket.gethostname()} {os.getpid()} {time.time()}\n"
    self._done = threading.Event()
    self._thread: threading.Thread | None = None

  def take(self) -> bool:
    """Whether it is ours now."""
    self._path.parent.mkdir(parents=True, exist_ok=True)
    if self._path.exists() and not _held(self._path):
      # Of all who find it stale one can move it away.
      aside = self._path.with_name(f"claim.{os.getpid()}.{time.time_ns()}")
      try:
        self._path.rename(aside)
        aside.unlink()
      except FileNotFoundError:
        return False
    try:
      with open(self._path, "x", encoding="utf-8") as f:
        f.write(self._own)
    except FileExistsError:
      return False
    self._thread = threading.Thread(target=self._renew, daemon=True)
    self._thread.start()
    return True

  def _renew(self) -> None:
    while not self._done.wait(RENEWED):
      try:
        os.utime(self._path)
      except OSError:
        return

  def release(self) -> None:
    """Lets others have it, if it is still ours."""
    self._done.set()
    try:
      if self._path.read_text(encoding="utf-8") == self._own:
        self._path.unlink()
    except OSError:
      pass


def claimed(
    cells: Iterable[Cell], wanted: Callable[[Cell], bool]
) -> list[tuple[Cell, Claim]]:
  """Those of the cells that are still wanted once they are ours."""
  found = []
  for cell in cells:
    if not wanted(cell):
      continue
    claim = Claim(cell)
    if not claim.take():
      continue
    if (cell.folder / "summary.json").exists():  # Done since we looked.
      claim.release()
      continue
    found.append((cell, claim))
  return found
