"""Runs all cells of a study, side by side where they can.

  python -m experiments.sweep --config=configs/studies/rank.py --dry_run
  python -m experiments.sweep --config=configs/studies/rank.py:runlocal
  python -m experiments.table --workdir=runs/sweeps/rank-runlocal

A study is a config with `sweep()`, its cells: overrides by field. Cells whose
adapters fit train in one compiled step on one base (lora_jax/train/members.py);
the others follow in turn. The same command goes on where a killed sweep
stopped: cells that are done stay as they are, those that failed are tried again
with --retry. Several hosts that see one --workdir may run it at once: each cell
is one host's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
import pathlib
import time

from absl import flags

from experiments import cli
from experiments.sweep import cells as cells_lib
from experiments.sweep import together
from lora_jax import errors
from lora_jax.train import progress as progress_lib
from lora_jax.train import workdir as workdir_lib


def default_workdir(path_and_arg: str) -> pathlib.Path:
  """`runs/sweeps/rank-runlocal`."""
  path, _, arg = path_and_arg.partition(":")
  name = pathlib.Path(path).stem + (f"-{arg.replace('/', '_')}" if arg else "")
  return pathlib.Path("runs") / "sweeps" / name


def table(cells: Sequence[cells_lib.Cell]) -> str:
  """A line a cell: its state, and what came of it."""
  width = max(len(c.name) for c in cells)
  lines = [f"{'cell':{width}}  state    held-out loss  tok/s  seconds"]
  for cell in cells:
    found = cell.summary()
    text = f"{cell.name:{width}}  {cell.state:8}"
    if found:
      loss = found.get("final_eval_loss")
      text += (f" {'' if loss is None else f'{loss:.4f}':>13}"
               f" {found['tokens_per_s'] or 0:>6,.0f}"
               f" {found['wall_seconds']:>8.0f}")
    lines.append(text.rstrip())
  counts = Counter(c.state for c in cells)
  return "\n".join([*lines, ", ".join(
      f"{n} {state}" for state, n in sorted(counts.items()))])


def estimate(
    cells: Sequence[cells_lib.Cell], groups: Sequence[Sequence[cells_lib.Cell]]
) -> float | None:
  """Seconds that the groups will take, by those done; None if none is."""
  speeds = []
  for cell in cells:
    found = cell.summary()
    if found and found["steps"]:
      # Those that shared their steps waited for each other.
      speeds.append(found["wall_seconds"] / found["steps"]
                    / found.get("together", 1))
  if not speeds:
    return None
  per_step = sum(speeds) / len(speeds)
  return per_step * sum(
      c.config["train"]["steps"] for group in groups for c in group)


def show(study: cells_lib.Study, groups) -> None:
  """The plan."""
  todo = sum(map(len, groups))
  seconds = estimate(study.cells, groups)
  print(f"{study.name}: {len(study.cells)} cells, {todo} to run in "
        f"{len(groups)} groups; about "
        + ("so long as the first will tell" if seconds is None
           else progress_lib.clock(seconds)))
  for number, group in enumerate(groups, 1):
    print(f"  {number}. {len(group)} "
          f"{'side by side' if len(group) > 1 else 'alone'}: "
          + "  ".join(c.name for c in group))


def run(
    study: cells_lib.Study, folder: pathlib.Path, most: int,
    retry: bool = False) -> None:
  """Runs what is to be run of a study.

  Args:
    study: from `cells.study`.
    folder: of the sweep.
    most: cells side by side.
    retry: whether cells that failed are tried again.

  Raises:
    errors.UsageError: if the folder holds another study's cells.
  """
  _open(study, folder)
  bench = together.Bench()
  tried: set[str] = set()

  def wanted(cell):
    return cell.name not in tried and (
        cell.state == "open" or (retry and cell.state == "failed"))

  started = time.monotonic()
  while True:
    groups = together.plan([c for c in study.cells if wanted(c)], most)
    if not groups:
      break
    held = cells_lib.claimed(groups[0], wanted)
    tried |= {cell.name for cell in groups[0]}
    if not held:
      continue
    try:
      together.run_group(bench, [cell for cell, _ in held])
    finally:
      for _, claim in held:
        claim.release()
    print(table(study.cells))
  print(f"{folder}: {progress_lib.clock(time.monotonic() - started)}; "
        f"python -m experiments.table --workdir={folder}")


def _open(study, folder):
  path = folder / "sweep.json"
  names = [c.name for c in study.cells]
  found = {"study": str(study.file), "arg": study.arg, "cells": names,
           "set": dict(study.changes),
           "overrides": {c.name: dict(c.overrides) for c in study.cells},
           "git_commit": workdir_lib.git_commit()}
  if path.exists():
    known = workdir_lib.read_json(path)
    if known and (known["study"], known["arg"]) != (
        found["study"], found["arg"]):
      raise errors.UsageError(
          f"{folder} holds the sweep {known['study']}:{known['arg']}, not "
          f"{found['study']}:{found['arg']}; choose another --workdir")
  workdir_lib.write_json(path, found)


def main() -> None:
  values = flags.FLAGS
  if values.config is None:
    raise errors.UsageError(
        "--config is missing; e.g. --config=configs/studies/rank.py:runlocal")
  folder = (pathlib.Path(values.workdir) if values.workdir
            else default_workdir(values.config))
  changes = dict(
      part.split("=", 1) for part in values.set.split(",") if part)
  study = cells_lib.study(values.config, folder, changes)
  left = [c for c in study.cells if c.state == "open" or (
      values.retry and c.state == "failed")]
  show(study, together.plan(left, values.together))
  if not values.dry_run:
    run(study, folder, values.together, values.retry)


if __name__ == "__main__":
  flags.DEFINE_string(
      "config", None,
      "A file of configs/studies/, with :arg behind it or not.")
  flags.DEFINE_string(
      "workdir", None, "Where the sweep is; under runs/sweeps/ by default.")
  flags.DEFINE_string("set", "", "block.field=value,... for all cells.")
  flags.DEFINE_bool("dry_run", False, "Only say what would run.")
  flags.DEFINE_bool("retry", False, "Try cells again that failed.")
  flags.DEFINE_integer(
      "together", 8, "Cells side by side, at most; 1: one after the other.")
  cli.run(main)
