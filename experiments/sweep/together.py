"""Cells that share a base are run on one, side by side where they can."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import contextlib
import json
from typing import Any

import jax

from experiments import blocks
from experiments import rows as rows_lib
from experiments import run
from experiments.sweep import cells as cells_lib
from lora_jax import api
from lora_jax import errors
from lora_jax.api import training as training_lib
from lora_jax.train import loop
from lora_jax.train import members
from lora_jax.train import sinks as sinks_lib

# Blocks of a config that say what the base is, and how it is loaded.
BASE = ("model", "quant", "compute", "mesh", "memory", "distributed")
# Fields in which cells of a group may differ; `members.kind` decides in the
# end. Whole blocks, and single fields.
FREE = ("seed", "optim", "data", "train", "log")
FREE_FIELDS = ("adapter.rank", "adapter.alpha", "adapter.dropout",
               "adapter.init")
SAME_FIELDS = ("optim.name", "data.max_length", "data.packing",
               "train.batch_size", "train.accumulation")


def base_key(config: dict[str, Any]) -> str:
  """What has to be equal for cells to share a base."""
  return json.dumps({name: config.get(name) for name in BASE} | _drawn(config),
                    sort_keys=True)


def _drawn(config: dict[str, Any]) -> dict[str, Any]:
  """The seed, where the base's weights are drawn of it."""
  return {"seed": config["seed"]} if blocks.scratch(config) else {}


def group_key(config: dict[str, Any]) -> str:
  """What has to be equal for cells to have a chance to train together."""
  found = _drawn(config)
  for block, fields in config.items():
    if not isinstance(fields, dict):
      fields = {"": fields}
    for name, value in fields.items():
      field = f"{block}.{name}".rstrip(".")
      free = block in FREE or field in FREE_FIELDS
      if not free or field in SAME_FIELDS:
        found[field] = value
  return json.dumps(found, sort_keys=True)


def plan(
    cells: Sequence[cells_lib.Cell], most: int
) -> list[list[cells_lib.Cell]]:
  """Groups of cells to run one after the other, at most `most` in each."""
  found: dict[str, list[cells_lib.Cell]] = {}
  for cell in cells:
    found.setdefault(group_key(cell.config), []).append(cell)
  # Of ranks near each other: members of a group are padded to the largest.
  groups = []
  for group in found.values():
    group = sorted(group, key=lambda c: c.config["adapter"]["rank"])
    part: list[cells_lib.Cell] = []
    for cell in group:
      ranks = [c.config["adapter"]["rank"] for c in (*part[:1], cell)]
      if part and (len(part) >= max(1, most)
                   or ranks[-1] > members.WASTE * ranks[0]):
        groups.append(part)
        part = []
      part.append(cell)
    groups.append(part)
  return groups


class Bench:
  """Bases and data that several cells share; the last base is kept."""

  def __init__(self) -> None:
    self._bases: dict[str, api.Model] = {}
    self._data: dict[str, rows_lib.Data] = {}
    self._encoded: dict[str, rows_lib.Encoded] = {}

  def model(self, config: dict[str, Any]) -> api.Model:
    key = base_key(config)
    if key not in self._bases:
      self._bases.clear()  # Before there are two of them.
      self._bases[key] = blocks.load(config, trains=True)
    return self._bases[key]

  def data(self, config: dict[str, Any]) -> rows_lib.Data:
    # Tokens depend on the model's tokenizer, not on how its base is held.
    read = json.dumps([config["model"], {
        name: config["data"].get(name) for name in rows_lib.READ}])
    key = json.dumps([read, config["data"], config["seed"]], sort_keys=True)
    if key not in self._data:
      model = self.model(config)
      if read not in self._encoded:
        self._encoded[read] = rows_lib.encoded(model, config)
      self._data[key] = rows_lib.datasets(model, config, self._encoded[read])
    return self._data[key]


def run_group(
    bench: Bench, cells: Sequence[cells_lib.Cell],
    note: Callable[[str], None] = print,
) -> None:
  """Runs cells; the error of one is noted in its folder, and ends no other.

  Args:
    bench: keeps what they share.
    cells: of one `group_key`.
    note: is told what happens.
  """
  config = cells[0].config
  precision = "highest" if config["compute"]["dtype"] == "float32" else None
  with (jax.default_matmul_precision(precision),
        contextlib.ExitStack() as stack):
    ready: list[tuple[cells_lib.Cell, run.Ready, sinks_lib.Sinks]] = []
    for cell in cells:
      with _noted(cell, note):
        blocks.check(cell.config)
        run.open_workdir(cell.folder, cell.config)
        (cell.folder / "error").unlink(missing_ok=True)
        sinks = stack.enter_context(
            sinks_lib.Sinks(blocks.log(cell.config), cell.config))
        ready.append((cell, run.prepare(
            cell.config, cell.folder, sinks, bench.model(cell.config),
            bench.data(cell.config)), sinks))
    for part in members.groups([r.training.run for _, r, _ in ready]):
      _fit([ready[i] for i in part], note)


def _fit(part, note):
  """One compiled step for all; or the run as it always is, of one."""
  if len(part) == 1:
    cell, ready, sinks = part[0]
    note(f"{cell.name}")
    with _noted(cell, note):
      _finish(ready, sinks, *ready.training.fit())
    return
  note("side by side: " + ", ".join(
      f"[{i}] {cell.name}" for i, (cell, _, _) in enumerate(part)))
  try:
    found = training_lib.fit([ready.training for _, ready, _ in part])
  except Exception as error:
    # Most likely there was no memory for all of them; if it is a fault of
    # ours, it may be one of this group alone.
    for cell, _, _ in part:
      cell.failed(error)
    note(f"side by side: failed: {_first_line(error)}; try --together="
         f"{max(1, len(part) // 2)} --retry")
    return
  for (cell, ready, sinks), one in zip(part, found, strict=True):
    with _noted(cell, note):
      if isinstance(one, errors.UserError):
        raise one
      _finish(ready, sinks, *one, together=len(part))


def _finish(
    ready: run.Ready, sinks: sinks_lib.Sinks, model: api.Model,
    outcome: loop.Outcome, together: int = 1) -> None:
  sinks.finish(ready.finish(model, outcome, together=together))


@contextlib.contextmanager
def _noted(
    cell: cells_lib.Cell, note: Callable[[str], None]) -> Iterator[None]:
  try:
    yield
  except Exception as error:  # One cell's fault is not the others'.
    cell.failed(error)
    note(f"{cell.name}: failed: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
  return (str(error).splitlines() or [type(error).__name__])[0]
