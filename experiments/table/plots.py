"""The pictures of a study."""

from __future__ import annotations

from collections.abc import Sequence
import pathlib
from typing import Any

import numpy as np

from experiments import finder
from experiments.table import results
from lora_jax.train import workdir as workdir_lib


def draw(
    arms: Sequence[results.Arm], found: Sequence[results.Run],
    baseline: results.Arm, folder: pathlib.Path) -> list[pathlib.Path]:
  """Writes whatever pictures the arms allow.

  Args:
    arms: of the study.
    found: all runs, those that were not chosen too.
    baseline: the arm that others are compared with.
    folder: where.
  """
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  made = []
  # What a range test ends at is no result.
  tests = any(run.cell.config["optim"]["schedule"] == "range" for run in found)
  for name in ("range",) if tests else ("curves", "factor", "map", "pareto"):
    figure, axes = pyplot.subplots(figsize=(7.2, 4.6), layout="constrained")
    if PICTURES[name](figure, axes, arms, found, baseline):
      made.append(folder / f"{name}.png")
      figure.savefig(made[-1], dpi=120)
    pyplot.close(figure)
  return made


def _lines(run, key):
  lines = workdir_lib.read_metrics(run.cell.folder / "metrics.jsonl")
  return {x["step"]: x[key] for x in lines if x.get(key) is not None}


def _curves(figure, axes, arms, found, baseline):
  """How held-out losses fell, the mean over seeds."""
  del found, figure, baseline
  lowest, drawn = 0.0, False
  batches = {_batch(run) for arm in arms for run in arm.runs}
  for colour, arm in zip(_colours(len(arms)), arms, strict=True):
    curves = [_lines(run, "eval_loss") for run in arm.runs]
    steps = sorted(set.intersection(*(set(c) for c in curves)))
    if len(steps) < 2:
      continue
    # Each from its own start: seeds hold out other rows.
    values = np.array([[c[s] - c[steps[0]] for s in steps] for c in curves])
    if len(batches) > 1:  # Steps of different sizes do not compare.
      steps = [s * _batch(arm.runs[0]) for s in steps]
    axes.plot(steps, values.mean(0), "o-", ms=3, color=colour, label=arm.name)
    if len(curves) > 1:
      axes.fill_between(
          steps, values.min(0), values.max(0), color=colour, alpha=0.12, lw=0)
    lowest, drawn = min(lowest, values.min()), True
  if not drawn:
    return False
  if lowest < 0:  # What diverges is out of sight.
    axes.set_ylim(1.1 * lowest, -0.2 * lowest)
  axes.set(xlabel="step" if len(batches) == 1 else "rows trained on",
           ylabel="held-out loss less that at step 0",
           title="mean over seeds; shaded: least to most")
  axes.grid(alpha=0.3)
  axes.legend(fontsize=7, ncols=1 + len(arms) // 12)
  return True


def _batch(run):
  """Rows a step."""
  train = run.cell.config["train"]
  return train["batch_size"] * train["accumulation"]


def _factor(figure, axes, arms, found, baseline):
  """Loss against the one number in which arms differ, with intervals."""
  del found, figure
  numeric = _numeric(arms)
  if len(numeric) != 1:
    return False
  field, = numeric
  rest: dict[str, list[results.Arm]] = {}
  for arm in arms:
    if field in arm.fields:
      key = ", ".join(f"{k.rpartition('.')[2]}={v}"
                      for k, v in arm.fields.items() if k != field)
      rest.setdefault(key, []).append(arm)
  for number, (colour, (name, group)) in enumerate(zip(
      _colours(len(rest)), rest.items(), strict=True)):
    group = sorted(group, key=lambda a: a.fields[field])
    # Beside each other.
    x = [a.fields[field] * 1.03 ** (number - (len(rest) - 1) / 2)
         for a in group]
    losses = [a.less(baseline) for a in group]
    low, high = np.array([s.interval() for s in losses]).T
    y = np.array([s.value for s in losses])
    axes.errorbar(x, y, [y - low, high - y], fmt="o-", capsize=3, ms=4,
                  color=colour, label=name or None)
  if min(a.fields.get(field, 1) for a in arms) > 0:
    axes.set_xscale("log", base=2 if field.endswith("rank") else 10)
    ticks = sorted({a.fields[field] for a in arms if field in a.fields})
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
  axes.axhline(0, color="0.6", lw=0.8)
  axes.set(xlabel=field, title="95% intervals, paired by seed and row",
           ylabel=f"held-out loss less that of {baseline.name}")
  axes.grid(alpha=0.3)
  if any(rest):
    axes.legend(fontsize=8)
  return True


def _map(figure, axes, arms, found, baseline):
  """Loss of every pair of values, of two numbers in which cells differ."""
  del arms, baseline
  fields = sorted({k for run in found for k, v in run.cell.overrides.items()
                   if k != "seed" and _number(v)})
  if len(fields) != 2 or any(
      not all(f in run.cell.overrides for f in fields) for run in found):
    return False
  rows, columns = (sorted({run.cell.overrides[f] for run in found})
                   for f in fields)
  sums: dict[tuple[int, int], list[float]] = {}
  for run in found:
    at = (rows.index(run.cell.overrides[fields[0]]),
          columns.index(run.cell.overrides[fields[1]]))
    nll, weight = run.half(1)
    sums.setdefault(at, []).append(nll.sum() / weight.sum())
  values = np.full((len(rows), len(columns)), np.nan)
  # Rows that are held out, and so losses, are a seed's: fewer do not compare.
  seeds = max(map(len, sums.values()))
  for at, losses in sums.items():
    values[at] = np.mean(losses) if len(losses) == seeds else np.nan
  if len(rows) < 2 or len(columns) < 2:
    return False
  # Above the lowest, in decades: some rates diverge, and colours are to tell
  # the good ones apart.
  above = values - np.nanmin(values)
  shown = np.log10(np.clip(above, 1e-3, 1.0))
  image = axes.imshow(shown, aspect="auto", cmap="viridis_r", vmin=-3, vmax=0)
  axes.set_yticks(range(len(rows)), [f"{r:g}" for r in rows])
  axes.set_xticks(range(len(columns)), [f"{c:g}" for c in columns])
  best = np.unravel_index(np.nanargmin(values), values.shape)
  for (i, j), value in np.ndenumerate(values):
    if np.isfinite(value):
      axes.text(j, i, f"{value:.3f}", ha="center", va="center", fontsize=8,
                color="black" if shown[i, j] < -1.5 else "white",
                fontweight="bold" if (i, j) == best else None)
  axes.set(xlabel=fields[1], ylabel=fields[0],
           title="held-out loss, mean over seeds; bold: the lowest")
  bar = figure.colorbar(image, ticks=[-3, -2, -1, 0], label="above the lowest")
  bar.ax.set_yticklabels(["0.001 or less", "0.01", "0.1", "1 or more"])
  return True


def _pareto(figure, axes, arms, found, baseline):
  """Loss against trained parameters."""
  del found, figure, baseline
  sizes = [arm.mean("trainable_parameters") or 0 for arm in arms]
  if len({s for s in sizes if s}) < 2:
    return False
  best = np.inf
  # Of one size the best alone: names of the others would lie on each other.
  kept: dict[float, tuple[float, results.Arm]] = {}
  for size, arm in zip(sizes, arms, strict=True):
    kept[size] = min(
        kept.get(size, (np.inf, arm)), (arm.loss().value, arm),
        key=lambda pair: pair[0])
  for size, (value, arm) in sorted(kept.items()):
    front, best = value < best, min(best, value)
    axes.scatter(size, value, s=26, color="C0" if front else "0.6", zorder=3)
    # Names are inside: to the left of points on the right.
    right = size > (min(s for s in sizes if s) * max(sizes)) ** 0.5
    axes.annotate(arm.name, (size, value), xytext=(-5 if right else 5, 4),
                  ha="right" if right else "left", fontsize=7,
                  textcoords="offset points")
  axes.set(xlabel="trained parameters", ylabel="held-out loss (nats a token)",
           title="the best of each size; blue: nothing smaller is better",
           xscale="log")
  axes.margins(x=0.12)
  axes.grid(alpha=0.3)
  return True


def _range(figure, axes, arms, found, baseline):
  """Smoothed training loss against the rate, of range tests."""
  del figure, found, baseline
  tests = [(arm, run) for arm in arms for run in arm.runs
           if run.cell.config["optim"]["schedule"] == "range"]
  colours = dict(zip((arm.name for arm in arms), _colours(len(arms)),
                     strict=True))
  for arm, run in tests:
    rates, losses = finder.points(workdir_lib.read_metrics(
        run.cell.folder / "metrics.jsonl"))
    axes.plot(rates, losses, color=colours[arm.name], lw=1,
              label=arm.name if run is arm.runs[0] else None)
    axes.plot(rates[losses.argmin()], losses.min(), "o", ms=4,
              color=colours[arm.name])
  if not tests:
    return False
  axes.set(xlabel="learning rate", ylabel="training loss, smoothed",
           title="range tests; points: the lowest loss", xscale="log")
  axes.grid(alpha=0.3)
  axes.legend(fontsize=8)
  return True


def _number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def _numeric(arms):
  """Fields with several values, all numbers."""
  values: dict[str, set] = {}
  for arm in arms:
    for field, value in arm.fields.items():
      values.setdefault(field, set()).add(value)
  return [f for f, v in values.items() if len(v) > 1 and all(map(_number, v))]


def _colours(n):
  from matplotlib import pyplot

  return pyplot.get_cmap("viridis")(np.linspace(0, 0.92, max(n, 1)))


# Name -> what draws it, and says whether the arms allow it.
PICTURES = {"curves": _curves, "factor": _factor, "map": _map,
            "pareto": _pareto, "range": _range}
