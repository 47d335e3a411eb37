"""The page of `experiments.compare`: a table and a plot, from its files."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np

from lora_jax.evaluate import statistics

BASELINE = "lora"


def results(folder: pathlib.Path) -> list[dict[str, Any]]:
  """What has been found so far, the best method first."""
  found = [json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))]
  return sorted((f for f in found if "loss" in f), key=lambda f: f["loss"])


def against(
    found: dict[str, Any], other: dict[str, Any]
) -> statistics.Difference:
  """Held-out loss of a method less another's, paired over rows."""
  return statistics.paired_difference(
      np.asarray(other["rows"]["nll"]), np.asarray(found["rows"]["nll"]),
      np.asarray(other["rows"]["weight"]))


def page(found: list[dict[str, Any]]) -> str:
  """The results as Markdown."""
  first = found[0]
  environment, plain = first["environment"], {
      f["method"]: f for f in found}.get(BASELINE)
  rates = ", ".join(f"{r:g}" for r in first["rates"])
  config = first["config"]
  train, data = config["train"], config["data"]
  lines = [
      "# All methods, same data, each at its best learning rate",
      "",
      f"Base: {config['model']['path']}, {config['quant']['format']}, loss "
      f"{first['start_loss']:.4f} nats a token before training (methods that "
      "start elsewhere: see their files). "
      f"Data: {data['path']}, {train['steps']} steps of "
      f"{train['batch_size']} x {data['max_length']} packed tokens, "
      f"{config['compute']['dtype']}, "
      f"{config['optim']['schedule']} schedule. Device: "
      f"{environment['device']}; jax {environment['versions'].get('jax')}; one "
      f"seed; commit {_all(found, 'git_commit', 7)}. Learning rates tried for "
      f"every method: {rates}; the best on one half of the held-out rows was "
      "chosen, losses are of the other half. Intervals: 95%, paired bootstrap "
      "over rows, which says nothing about other seeds. Speed: median step of "
      "one adapter alone, all in one process after the other"
      f"{_flags(found)}, those with † in another run than the others, with "
      "which they cannot be compared; memory: arguments and temporaries of "
      "that step's program. A method's file holds its config, command and "
      "versions, its loss at every rate, and that of every row at the best.",
      "",
      "| method | held-out loss | less LoRA's | rate | parameters | tok/s | "
      "memory, GiB |",
      "|---|---|---|---|---|---|---|"]
  for one in found:
    difference = "" if plain is None or one is plain else str(
        against(one, plain))
    speed, memory = one.get("tokens_per_second"), one.get("step_bytes")
    edge = one["rate"] in (one["rates"][0], one["rates"][-1])
    lines.append(
        f"| [{one['method']}]({one['method']}.json) | {one['loss']:.4f} | "
        f"{difference} | {one['rate']:g}{'*' if edge else ''} | "
        f"{one['parameters']:,} | "
        f"{'' if speed is None else f'{speed:,.0f}'}"
        f"{_other(one, found)} | "
        f"{'' if memory is None else f'{memory / 2**30:.2f}'} |")
  return "\n".join([
      *lines, "", "\\* at the edge of the grid: a rate beyond it may be "
      "better.", "", "![held-out loss against parameters](loss.png)", ""])


def _other(one: dict[str, Any], found: list[dict[str, Any]]) -> str:
  """A mark, if it was timed in another run than most."""
  runs = [f.get("timed_commit") for f in found if "step_seconds" in f]
  if "step_seconds" not in one:
    return ""
  return "" if one.get("timed_commit") == max(runs, key=runs.count) else " †"


def _all(found: list[dict[str, Any]], key: str, length: int) -> str:
  """What the environments say, of which there may be several."""
  return ", ".join(sorted({
      str(f["environment"][key])[:length] for f in found}))


def _flags(found: list[dict[str, Any]]) -> str:
  flags = sorted({f["timed_with"] for f in found if f.get("timed_with")})
  return f" (XLA_FLAGS {'; '.join(flags)})" if flags else ""


def plot(found: list[dict[str, Any]], path: pathlib.Path) -> None:
  """Held-out loss against trained parameters."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(figsize=(9, 6))
  best = np.inf
  for one in sorted(found, key=lambda f: f["parameters"]):
    front = one["loss"] < best
    best = min(best, one["loss"])
    axes.scatter(one["parameters"], one["loss"], s=24,
                 color="tab:blue" if front else "tab:grey")
  axes.set_xlabel("trained parameters")
  axes.set_ylabel("held-out loss, nats a token")
  axes.set_ymargin(0.08)
  axes.set_title("blue: no method with fewer parameters is better")
  axes.set_xscale("log")
  figure.tight_layout()
  _label(axes, found)
  figure.savefig(path, dpi=120)
  pyplot.close(figure)


def _label(axes: Any, found: list[dict[str, Any]]) -> None:
  """Names beside the points, each above those that are in its way."""
  taken: list[tuple[float, float, float]] = []
  height = 11  # Of a line of the names, in pixels.
  for one in sorted(found, key=lambda f: f["loss"]):
    point = one["parameters"], one["loss"]
    x, y = axes.transData.transform(point)
    width = 6.5 * len(one["method"])
    left = x - width - 6 if x + width > axes.bbox.x1 else x + 6
    low = y
    while any(left < b and a < left + width and abs(low - c) < height
              for a, b, c in taken):
      low += height / 4
    taken.append((left, left + width, low))
    at = axes.transData.inverted().transform((left, low))
    axes.annotate(
        one["method"], point, xytext=at, fontsize=7, va="center",
        arrowprops={"arrowstyle": "-", "lw": 0.4, "color": "0.7"}
        if low > y else None)


def write(folder: pathlib.Path) -> None:
  """README.md and loss.png of a folder of results."""
  found = results(folder)
  if found:
    (folder / "README.md").write_text(page(found))
    plot(found, folder / "loss.png")
