"""A learning rate out of a range test.

`optim.schedule=range` lets the rate grow geometrically (Smith 2017, "Cyclical
learning rates for training neural networks", section 3.3). A tenth of the rate
at which the smoothed training loss is lowest is the usual one to begin with
(Howard and Gugger's `lr_find`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Share of the steps over which the loss is averaged.
WINDOW = 0.1
# Not above so many times the lowest: it has diverged there.
DIVERGED = 4.0


def points(
    lines: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
  """(rates, training losses averaged around them), until they diverge.

  The mean of a window around each step: a moving average that starts at the
  first batch's loss is as low as that one, if its rows happen to be easy.

  Args:
    lines: of metrics.jsonl.
  """
  found = [x for x in lines if x.get("loss") is not None]
  width = min(len(found), 2 * round(WINDOW * len(found) / 2) + 1)
  if not found:
    return np.zeros(0), np.zeros(0)
  losses = np.asarray([x["loss"] for x in found], np.float64)
  rates = np.asarray([x["lr"] for x in found], np.float64)
  kernel = np.full(width, 1 / width)
  smooth = np.convolve(losses, kernel, "valid")
  rates = rates[width // 2:][:len(smooth)]
  lowest = np.minimum.accumulate(smooth)
  bad = ~(smooth <= DIVERGED * lowest)
  end = int(bad.argmax()) if bad.any() else len(smooth)
  return rates[:end], smooth[:end]


def advice(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """What `summary.json` says of a range test; nothing without steps."""
  rates, losses = points(lines)
  if not len(rates):
    return {}
  best = int(losses.argmin())
  where = float(rates[best])
  text = (f"range test: the training loss is lowest ({losses[best]:.4f}) at "
          f"optim.learning_rate={where:.2g}; begin with a tenth, as is usual, "
          f"{where / 10:.2g}, and try up to {where:.2g}, which was near the "
          "best for LoRA (docs/results/finder)")
  if best == len(rates) - 1:
    text += "; it still fell at the end: test up to a higher rate"
  return {"lowest_loss_rate": where, "suggested_learning_rate": where / 10,
          "advice": text}
