"""Does warm-up matter?

  python -m experiments.sweep --config=configs/studies/warmup.py
  python -m experiments.sweep --config=configs/studies/warmup.py:runlocal

Published: none with numbers to compare with; 0.03 of the steps is usual.

Prediction: no difference between 0 and 0.1 of the steps, each at its own
learning rate.

Verdict: "no difference" holds if the 90% interval is within 0.01 nats.
"""

from __future__ import annotations

from typing import Any

from ml_collections import config_dict

from configs import common
from configs import grid


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """The run that all cells are changes of."""
  return common.study(local=arg == "runlocal")


def sweep(arg: str = "") -> grid.Cells:
  """Shares x learning rates x seeds."""
  shares = {"optim.warmup": (0.0, 0.03, 0.1, 0.3)}
  if arg == "runlocal":
    return grid.cross({"optim.warmup": (0.0, 0.1)}, {"seed": (0, 1)})
  return grid.cross(shares, grid.RATES, grid.SEEDS)


def tuned(arg: str = "") -> tuple[str, ...]:
  """What is chosen for each arm, on half of the held-out rows."""
  return ("optim.learning_rate",) if arg != "runlocal" else ()


def claims(arg: str = "") -> list[dict[str, Any]]:
  """What the page says held or did not."""
  del arg
  return [grid.same("no warm-up is as good as a tenth",
                    {"optim.warmup": 0.0}, {"optim.warmup": 0.1})]
