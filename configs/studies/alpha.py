"""Does alpha matter beside the learning rate?

  python -m experiments.sweep --config=configs/studies/alpha.py
  python -m experiments.sweep --config=configs/studies/alpha.py:runlocal

Published: LoRA (arXiv 2106.09685, section 4.1): with Adam, to tune alpha is
roughly to tune the learning rate.

Prediction: no difference between alphas of 8 to 64 at rank 16, each at its own
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
  """Alphas x learning rates x seeds."""
  if arg == "runlocal":
    return grid.cross({"adapter.alpha": (8.0, 32.0)}, {"seed": (0, 1)})
  return grid.cross(
      {"adapter.alpha": (8.0, 16.0, 32.0, 64.0)}, grid.RATES, grid.SEEDS)


def tuned(arg: str = "") -> tuple[str, ...]:
  """What is chosen for each arm, on half of the held-out rows."""
  return ("optim.learning_rate",) if arg != "runlocal" else ()


def claims(arg: str = "") -> list[dict[str, Any]]:
  """What the page says held or did not."""
  return [grid.same("alpha is a learning rate", {"adapter.alpha": 8.0},
                    {"adapter.alpha": 32.0})]
