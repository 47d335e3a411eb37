"""The cells of a sweep as arms: what was compared, over seeds.

An arm is what is left of a cell's overrides without its seed and without what
each arm is tuned over (`tuned()` of the study). The value of that is chosen on
one half of the held-out rows; every number of the table is of the other half.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
import dataclasses
import json
import pathlib
import runpy
from typing import Any

import numpy as np

from experiments import watched as watched_lib
from experiments.sweep import cells as cells_lib
from lora_jax import errors
from lora_jax.evaluate import statistics
from lora_jax.train import workdir as workdir_lib


@dataclasses.dataclass(frozen=True)
class Run:
  """A cell that is done.

  Attributes:
    cell: it.
    summary: `summary.json`.
    commit: of its code.
    nll, weight: `[n]` of the held-out rows at its end.
    watched: `[m]` more nats of each watched row than before training, and its
      tokens; None if nothing was watched.
  """

  cell: cells_lib.Cell
  summary: Mapping[str, Any]
  commit: str | None
  nll: np.ndarray
  weight: np.ndarray
  watched: tuple[np.ndarray, np.ndarray] | None = None

  def half(self, which: int) -> tuple[np.ndarray, np.ndarray]:
    """Every second row, from row `which` on."""
    return self.nll[which::2], self.weight[which::2]

  def of(self, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Sums and weights of rows: `held_out`, of the half that nothing was
    chosen on, or `watched`.

    Raises:
      errors.UserError: if nothing was watched.
    """
    errors.choose("claim of", what, dict.fromkeys(("held_out", "watched")))
    if what == "held_out":
      return self.half(1)
    if self.watched is None:
      raise errors.UserError(
          f"{self.cell.name}: no {watched_lib.FILE}; set data.watch_path in "
          "the study")
    return self.watched

  @property
  def seed(self) -> Any:
    return self.cell.config["seed"]


@dataclasses.dataclass(frozen=True)
class Arm:
  """What differs from other arms, and its runs, one a seed.

  Attributes:
    name: for tables.
    fields: overrides by field.
    runs: in the order of the seeds.
    chosen: what it was tuned to, by field.
    edge: whether that is at an end of what was tried.
    missing: of its cells, how many are not done: what it was tuned to is not
      known then, nor what all seeds say.
  """

  name: str
  fields: Mapping[str, Any]
  runs: tuple[Run, ...]
  chosen: Mapping[str, Any]
  edge: bool
  missing: int = 0

  def loss(self, of: str = "held_out") -> statistics.Samples:
    """Nats a token; see `Run.of`."""
    return statistics.over_seeds([run.of(of) for run in self.runs])

  def less(
      self, other: Arm, of: str = "held_out", times: float = 1.0
  ) -> statistics.Samples:
    """This arm's loss less `times` another's, paired by seed and row.

    Raises:
      errors.UserError: if they have no seed in common.
    """
    theirs = {run.seed: run for run in other.runs}
    pairs = []
    for run in self.runs:
      if run.seed in theirs:
        (a, weight), (b, _) = run.of(of), theirs[run.seed].of(of)
        pairs.append((a - times * b, weight))
    if not pairs:
      raise errors.UserError(
          f"{self.name} and {other.name} have no seed in common; run the "
          "sweep to its end")
    return statistics.over_seeds(pairs)

  def mean(self, key: str) -> float | None:
    """Of a number of the summaries."""
    values = [run.summary.get(key) for run in self.runs]
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None


@dataclasses.dataclass(frozen=True)
class Parts:
  """What a study says of its arms.

  Attributes:
    tuned: fields that are chosen for each arm.
    baseline: the fields of the arm that others are compared with; of the
      first if it has none.
  """

  tuned: tuple[str, ...]
  baseline: Mapping[str, Any]


def parts(study: cells_lib.Study) -> Parts:
  """`tuned()` and `baseline()` of a study's file, where it has them."""
  found = runpy.run_path(str(study.file))
  given = (study.arg,) if study.arg else ()
  return Parts(
      tuple(found["tuned"](*given)) if "tuned" in found else (),
      found["baseline"](*given) if "baseline" in found else {})


def runs(cells: Sequence[cells_lib.Cell]) -> list[Run]:
  """Those of the cells that are done."""
  found = []
  for cell in cells:
    summary = cell.summary()
    if summary is None:
      continue
    rows = json.loads((
        cell.folder / "evals" / f"{summary['steps']}.json").read_text())
    environment = workdir_lib.read_json(cell.folder / "environment.json") or {}
    found.append(Run(
        cell, summary, environment.get("git_commit"),
        np.asarray(rows["nll"]), np.asarray(rows["weight"]),
        _watched(cell.folder)))
  return found


def _watched(folder):
  found = workdir_lib.read_json(folder / watched_lib.FILE)
  if found is None:
    return None
  before, after, weight = (
      np.asarray(found[k]) for k in ("before", "after", "weight"))
  return after - before, weight


def check_commits(found: Sequence[Run], mix: bool) -> None:
  """Refuses cells of different code, unless told to.

  Raises:
    errors.UserError: names the commits and how many cells each has.
  """
  commits = sorted({str(run.commit) for run in found})
  if len(commits) > 1 and not mix:
    raise errors.UserError(
        "the cells are of different commits: " + ", ".join(
            f"{c[:12]} ({sum(str(r.commit) == c for r in found)} cells)"
            for c in commits)
        + "; run those of older ones again (delete their folders), or give "
        "--mix, which marks them")


def _arm(cell, tuned):
  """Name and fields of a cell's arm."""
  own = {k: v for k, v in cell.overrides.items()
         if k != "seed" and k not in tuned}
  return cells_lib.names([own])[0], own


def absent(
    cells: Sequence[cells_lib.Cell], tuned: Sequence[str],
    made: Sequence[Arm]) -> list[str]:
  """Arms of which no cell is done."""
  there = {arm.name for arm in made}
  return [name for name in dict.fromkeys(_arm(c, tuned)[0] for c in cells)
          if name not in there]


def arms(
    found: Sequence[Run], tuned: Sequence[str],
    cells: Sequence[cells_lib.Cell] = ()) -> list[Arm]:
  """The arms, in the order of the sweep.

  Args:
    found: cells that are done.
    tuned: see `Parts`.
    cells: all of them, for `Arm.missing`.
  """
  wanted = collections.Counter(_arm(cell, tuned)[0] for cell in cells)
  grouped: dict[str, dict[str, list[Run]]] = {}
  fields: dict[str, dict[str, Any]] = {}
  for run in found:
    name, own = _arm(run.cell, tuned)
    fields[name] = own
    tried = json.dumps({k: run.cell.overrides[k] for k in tuned
                        if k in run.cell.overrides})
    grouped.setdefault(name, {}).setdefault(tried, []).append(run)
  made = []
  for name, options in grouped.items():
    def chosen_on(text, options=options):
      return statistics.over_seeds(
          [run.half(0) for run in options[text]], resamples=1).value

    # Losses are of a seed's held-out rows: fewer seeds do not compare.
    most = max(map(len, options.values()))
    best = min((text for text, its in options.items() if len(its) == most),
               key=chosen_on)
    values = json.loads(best)
    edge = any(
        value in (min(all_), max(all_)) for key, value in values.items()
        if len(all_ := {json.loads(t)[key] for t in options}) > 1)
    made.append(Arm(
        name, fields[name], tuple(sorted(
            options[best], key=lambda run: str(run.seed))), values, edge,
        max(0, wanted[name] - sum(map(len, options.values())))))
  return made


def arm_of(made: Sequence[Arm], wanted: Mapping[str, Any]) -> Arm | None:
  """The arm with these fields; None if it has not run, or several have."""
  found = [arm for arm in made if all(
      arm.fields.get(k) == v for k, v in wanted.items())]
  exact = [arm for arm in found if dict(arm.fields) == dict(wanted)]
  if len(exact or found) == 1:
    return (exact or found)[0]
  return None


def folder_study(folder: pathlib.Path) -> cells_lib.Study:
  """The study of a sweep's folder, as it was when it ran.

  Raises:
    errors.UserError: if the folder holds none.
  """
  known = workdir_lib.read_json(folder / "sweep.json")
  if known is None:
    raise errors.UserError(
        f"{folder} holds no sweep.json; give the --workdir of a sweep")
  study = cells_lib.study(
      known["study"] + (f":{known['arg']}" if known["arg"] else ""), folder,
      known.get("set"))
  now = {cell.name for cell in study.cells}
  cells = [c for c in study.cells if c.name in known["cells"]]
  gone = [n for n in known["cells"] if n not in now]
  if gone:
    raise errors.UserError(
        f"{folder}: cell {gone[0]} is no longer one of {known['study']}; "
        "check out the commit that ran it, "
        f"{str(known['git_commit'])[:12]}")
  return dataclasses.replace(study, cells=tuple(cells))
