"""Whether a run overfits, and what to do: a sentence with its evidence.

  held-out loss rises after its best step    fewer steps, less rank, dropout
  the gap to the training loss opens         the same, before it costs
  held-out loss still falls at the end       more steps
  it never fell                              another learning rate
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Nats a token that are not noise of a few hundred rows.
RISE = 0.005
# Of the gap between held-out and training loss, from its first to its last.
OPENING = 0.1
# Share of the fall so far that another run of the same length would add.
FALLING = 0.05
# Share of steps whose batches make a training loss.
WINDOW = 0.1


def gap(lines: Sequence[Mapping[str, Any]]) -> list[tuple[int, float, float]]:
  """(step, held-out loss, training loss around it) of every evaluation.

  Args:
    lines: of metrics.jsonl.
  """
  train = [(x["step"], x["loss"]) for x in lines if x.get("loss") is not None]
  if not train:
    return []
  steps, losses = map(np.asarray, zip(*train, strict=True))
  width = max(1, round(WINDOW * len(steps)))
  found = []
  for line in lines:
    if "eval_loss" in line and line["step"] > 0:
      near = np.argsort(np.abs(steps - line["step"]), kind="stable")[:width]
      found.append((line["step"], line["eval_loss"],
                    float(losses[near].mean())))
  return found


def advice(
    lines: Sequence[Mapping[str, Any]], config: Mapping[str, Any] | None = None
) -> dict[str, Any]:
  """What `summary.json` says of fitting.

  Args:
    lines: of metrics.jsonl.
    config: resolved, to name what may be changed, or None.

  Returns:
    `train_eval_gap` and its change in nats a token, and `advice`; nothing
    without evaluations.
  """
  points = gap(lines)
  evals = [(x["step"], x["eval_loss"]) for x in lines if "eval_loss" in x]
  if not points or len(evals) < 2:
    return {}
  last, final, train = points[-1]
  start = evals[0][1]
  best_step, best = min(evals, key=lambda pair: pair[1])
  opened = (final - train) - (points[0][1] - points[0][2])
  if final - best > RISE and best_step > 0:
    text = (
        f"overfits: the held-out loss was best at step {best_step} "
        f"({best:.4f}) and is {final - best:.4f} higher after {last}; "
        f"{_less(config, best_step)}")
  elif best_step == 0:
    text = (
        f"the held-out loss never fell below its start, {start:.4f}; "
        + ("lower optim.learning_rate" if final - start > RISE else
           "raise optim.learning_rate, or look at the data"))
  elif opened > OPENING and len(points) > 2:
    text = (
        f"begins to overfit: the held-out loss is {final - train:.3f} above "
        f"the training loss, {opened:.3f} more than at step {points[0][0]}; "
        f"{_less(config, None)}")
  elif _slope(evals) > FALLING:
    text = (
        f"not done: over the last half of its steps the held-out loss still "
        f"fell by {_fall(evals):.4f} of {start - final:.4f}; raise train.steps")
  else:
    text = (f"fits: the held-out loss fell from {start:.4f} to {final:.4f} and "
            "has settled")
  return {"train_eval_gap": final - train, "train_eval_gap_change": opened,
          "advice": text}


def _less(config, step):
  ways = [f"train.steps={step} or train.patience=2"] if step else []
  adapter = (config or {}).get("adapter", {})
  if adapter.get("rank", 0) > 1:
    ways.append(f"a lower adapter.rank than {adapter['rank']}")
  if adapter and not adapter.get("dropout"):
    ways.append("adapter.dropout=0.1")
  ways.append("more rows")
  return "try " + ", ".join(ways)


def _fall(evals):
  """How far the loss fell in the second half of the steps."""
  middle = evals[-1][0] / 2
  before = [loss for step, loss in evals if step <= middle]
  return before[-1] - evals[-1][1]


def _slope(evals):
  """That, as a part of the whole fall; needs an evaluation in between."""
  total = evals[0][1] - evals[-1][1]
  if len(evals) < 3 or total <= 0:
    return 0.0
  return _fall(evals) / total
