"""Does weight decay matter for adapters?

  python -m experiments.sweep --config=configs/studies/weight_decay.py
  python -m experiments.sweep --config=configs/studies/weight_decay.py:runlocal

Published: none with numbers to compare with.

Prediction: no difference from 0 to 0.1 in so few steps.

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
  """Decays x learning rates x seeds."""
  decays = {"optim.weight_decay": (0.0, 0.01, 0.1, 1.0)}
  if arg == "runlocal":
    return grid.cross({"optim.weight_decay": (0.0, 0.1)}, {"seed": (0, 1)})
  return grid.cross(decays, grid.RATES, grid.SEEDS)


def tuned(arg: str = "") -> tuple[str, ...]:
  """What is chosen for each arm, on half of the held-out rows."""
  return ("optim.learning_rate",) if arg != "runlocal" else ()


def claims(arg: str = "") -> list[dict[str, Any]]:
  """What the page says held or did not."""
  del arg
  return [grid.same("a decay of 0.1 makes no difference",
                    {"optim.weight_decay": 0.1}, {"optim.weight_decay": 0.0})]
