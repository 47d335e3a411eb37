"""A learning rate out of a range test.

`optim.schedule=range` lets the rate grow geometrically; where the smoothed
training loss is lowest, divided by ten, is a rate to begin with (Smith 2017,
"Cyclical learning rates for training neural networks", section 3.3, as used by
Howard and Gugger's `lr_find`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import math
from typing import Any

import numpy as np

# Of the moving average, as in `lr_find`.
SMOOTHING = 0.98
# Not above so many times the lowest: it has diverged there.
DIVERGED = 4.0


def points(
    lines: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
  """(rates, smoothed training losses) of metrics.jsonl, until it diverges."""
  rates: list[float] = []
  losses: list[float] = []
  average = 0.0
  found = [x for x in lines if x.get("loss") is not None]
  # An average over a twentieth of the test, if it is short.
  beta = min(SMOOTHING, 1 - 1 / max(2.0, len(found) / 20))
  for number, line in enumerate(found, 1):
    average = beta * average + (1 - beta) * line["loss"]
    smooth = average / (1 - beta**number)
    if losses and (not math.isfinite(smooth)
                   or smooth > DIVERGED * min(losses)):
      break
    rates.append(line["lr"])
    losses.append(smooth)
  return np.asarray(rates), np.asarray(losses)


def advice(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """What `summary.json` says of a range test; nothing without steps."""
  rates, losses = points(lines)
  if not len(rates):
    return {}
  best = int(losses.argmin())
  where = float(rates[best])
  text = (f"range test: the training loss is lowest ({losses[best]:.4f}) at "
          f"optim.learning_rate={where:.2g}; begin with a tenth, "
          f"{where / 10:.2g}")
  if best == len(rates) - 1:
    text += " or more: it still fell at the end; test up to a higher rate"
  return {"lowest_loss_rate": where, "suggested_learning_rate": where / 10,
          "advice": text}
