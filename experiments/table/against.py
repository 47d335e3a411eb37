"""A sweep against committed results: did it come to the same?

  python -m experiments.table --workdir=runs/sweeps/rank \\
      --against=docs/results/rank

compares cells of the same name, arms (means over seeds), what they were tuned
to, and verdicts. Other kernels round otherwise, so that bits differ from card
to card; whether a difference matters is seen beside those that the study found.
"""

from __future__ import annotations

from collections.abc import Sequence
import csv
import pathlib
import re

import numpy as np

from experiments.table import page
from experiments.table import results
from experiments.table import verdicts
from lora_jax import errors

FILES = ("cells.csv", "table.csv", "README.md")


def compare(
    folder: pathlib.Path, found: Sequence[results.Run],
    arms: Sequence[results.Arm], judged: Sequence[verdicts.Verdict],
) -> list[str]:
  """Lines that say how far a sweep is from a folder of results.

  Args:
    folder: what `page.write` made of another sweep.
    found, arms, judged: of this one.

  Raises:
    errors.UserError: if the folder is none, or has no cell of this sweep.
  """
  for name in FILES:
    if not (folder / name).exists():
      raise errors.UserError(
          f"{folder} holds no {name}; give --against a folder that "
          "experiments.table wrote")
  theirs = {row["cell"]: float(row["loss_other_half"])
            for row in _read(folder / "cells.csv")}
  ours = {run.cell.name: page.losses(run)[1] for run in found}
  both = [name for name in ours if name in theirs]
  if not both:
    raise errors.UserError(
        f"{folder} has no cell of this sweep, such as {next(iter(ours))}; give "
        "--against results of the same study")
  cells = {name: abs(ours[name] - theirs[name]) for name in both}
  worst = max(cells, key=lambda name: cells[name])
  lines = [
      f"against {folder}: {len(both)} cells of its {len(theirs)} and of "
      f"{len(ours)} here; largest difference of a cell {cells[worst]:.4f} "
      f"({worst}), median {np.median(list(cells.values())):.4f} nats"]
  known = {row["arm"].rstrip(" †‡"): row for row in _read(folder / "table.csv")}
  differences = {}
  for arm in arms:
    other = known.get(arm.name)
    if other is None:
      continue
    tuned, there = page.tuned_to(arm), other["tuned to"].rstrip("*")
    if tuned != there:
      lines.append(f"{arm.name}: tuned to {tuned}, there to {there}")
    else:
      differences[arm.name] = arm.loss().value - float(other["held-out loss"])
  if differences:
    worst = max(differences, key=lambda name: abs(differences[name]))
    lines.append(
        f"{len(differences)} arms tuned alike; largest difference of one "
        f"{differences[worst]:+.4f} ({worst})")
  said = dict(re.findall(
      r"(?m)^\| (.*?) \| \*\*(.*?)\*\* \|",
      (folder / "README.md").read_text(encoding="utf-8")))
  changed = [f"{v.text}: {v.verdict}, there {said[v.text]}" for v in judged
             if said.get(v.text, v.verdict) != v.verdict]
  return lines + (changed or ["the same verdicts"])


def _read(path):
  with path.open(encoding="utf-8", newline="") as file:
    return list(csv.DictReader(file))
