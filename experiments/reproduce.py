"""Replaying a work directory: did it come to the same?

  python -m experiments.run --reproduce=runs/quickstart-1a2b3c4d

runs its config again, beside it, and compares every number of metrics.jsonl.
On the same kind of device with the same versions, flags and threads they have
to be the same bits (on a GPU with compute.deterministic=True); elsewhere losses
have to be within `TOLERANCES` of each other. What differs is named by its first
step, with whatever is seen to be other: versions, device, data, base.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import hashlib
import pathlib
from typing import Any

import numpy as np

from lora_jax import errors
from lora_jax.data import dataset as dataset_lib
from lora_jax.train import workdir as workdir_lib

# Largest relative difference of a loss, by the type of the activations, where
# the same bits cannot be asked for. Rounding grows from step to step.
TOLERANCES = {"float32": 1e-3, "bfloat16": 2e-2, "float16": 2e-2}
# What the same bits need to be equal.
MACHINE = ("device", "backend", "device_count", "threads", "xla_flags",
           "versions")
# Of metrics.jsonl: measured, not computed.
SPEEDS = ("tokens_per_s",)
LOSSES = ("loss", "eval_loss")


def inputs(
    fingerprint: str, rows: dataset_lib.Dataset,
    held_out: dataset_lib.Dataset | None) -> dict[str, Any]:
  """What a run's result depends on beside config and code: inputs.json."""
  return {"base": fingerprint, "rows": digest(rows),
          "held_out": None if held_out is None else digest(held_out)}


def digest(rows: dataset_lib.Dataset) -> str:
  """sha256 of the tokens and weights of rows, in their order."""
  found = hashlib.sha256()
  for one in rows:
    found.update(np.int64(len(one.tokens)).tobytes())
    found.update(np.ascontiguousarray(one.tokens, np.int32).tobytes())
    found.update(np.ascontiguousarray(one.weights, np.float32).tobytes())
  return found.hexdigest()


@dataclasses.dataclass(frozen=True)
class Comparison:
  """What a replay showed.

  Attributes:
    same: whether it counts as reproduced.
    text: a sentence for users.
  """

  same: bool
  text: str


def compare(old: pathlib.Path, new: pathlib.Path) -> Comparison:
  """Compares two work directories of one config.

  Args:
    old: what was to be reproduced.
    new: the replay.
  """
  causes, machine = _causes(old, new)
  a, b = _metrics(old), _metrics(new)
  if not a:
    return Comparison(False, f"{old}/metrics.jsonl has no numbers")
  worst, first, exact = 0.0, "", True
  for at in a:
    if at not in b:
      return Comparison(False, _differs(
          old, f"{at[1]} of step {at[0]} is missing in {new}", causes))
    if a[at] == b[at]:
      continue
    if exact:
      first = f"{at[1]} of step {at[0]} is {b[at]!r}, it was {a[at]!r}"
    exact = False
    if at[1] in LOSSES and None not in (a[at], b[at]):
      worst = max(worst, abs(b[at] - a[at]) / max(abs(a[at]), 1e-12))
  number = len({step for step, _ in a})
  if exact:
    return Comparison(True, f"reproduced: {number} steps, bit for bit")
  config = workdir_lib.read_json(old / "config.json") or {}
  compute = config.get("compute", {})
  limit = TOLERANCES.get(compute.get("dtype", "float32"), 1e-3)
  bits = not machine and (
      _environment(old).get("backend") == "cpu"
      or compute.get("deterministic", False))
  if bits or worst > limit:
    wanted = ("the same bits" if bits else
              f"losses within {limit:g}; the worst is {worst:.2g} away")
    return Comparison(False, _differs(old, f"{first} (wanted: {wanted})",
                                      causes))
  return Comparison(True, (
      f"reproduced: {number} steps, losses within {worst:.2g} of what they "
      f"were (limit {limit:g}); the same bits are not to be had: "
      + ("; ".join(machine) or "compute.deterministic is off")))


def _differs(old, what, causes):
  seen = "; ".join(causes) or (
      "nothing else is seen to differ: not versions, device, data or base")
  return f"{old} is not reproduced: {what}. Seen to differ: {seen}"


def _causes(old, new) -> tuple[list[str], list[str]]:
  """(everything that differs, what of it is the machine's) as texts."""
  a, b = _environment(old), _environment(new)
  machine = []
  for name in MACHINE:
    was, now = a.get(name), b.get(name)
    if isinstance(was, Mapping) and isinstance(now, Mapping):
      machine += [f"{k} {was.get(k)} -> {now.get(k)}"
                  for k in sorted({*was, *now}) if was.get(k) != now.get(k)]
    elif was != now:
      machine.append(f"{name} {was} -> {now}")
  others = []
  if a.get("git_commit") != b.get("git_commit"):
    others.append("commit " + " -> ".join(
        str(x.get("git_commit"))[:12] for x in (a, b)))
  was, now = (workdir_lib.read_json(f / "inputs.json") or {}
              for f in (old, new))
  for name, what in (("base", "the base's weights"), ("rows", "the rows"),
                     ("held_out", "the held-out rows")):
    if name in was and was[name] != now.get(name):
      others.append(f"{what} ({str(was[name])[:12]} -> "
                    f"{str(now.get(name))[:12]})")
  return others + machine, machine


def _environment(folder) -> dict[str, Any]:
  return workdir_lib.read_json(folder / "environment.json") or {}


def _metrics(folder) -> dict[tuple[int, str], Any]:
  """Numbers by step and name, in their order."""
  return {(line["step"], name): value
          for line in workdir_lib.read_metrics(folder / "metrics.jsonl")
          for name, value in line.items() if name not in ("step", *SPEEDS)}


def start(folder: pathlib.Path) -> dict[str, Any]:
  """The config of a work directory.

  Raises:
    errors.UserError: if it holds none.
  """
  config = workdir_lib.read_json(folder / "config.json")
  if config is None:
    raise errors.UserError(
        f"{folder} holds no config.json; give the work directory of a run")
  return config
