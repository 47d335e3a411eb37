"""Does dropout on the adapters' input help?

  python -m experiments.sweep --config=configs/studies/dropout.py
  python -m experiments.sweep --config=configs/studies/dropout.py:runlocal

Published: none with numbers to compare with; QLoRA (arXiv 2305.14314) uses 0.1
for 7B and 13B models.

Prediction: no difference within one epoch; it helps where the data are few.

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
  """Rates x learning rates x seeds."""
  rates = {"adapter.dropout": (0.0, 0.05, 0.1, 0.3)}
  if arg == "runlocal":
    return grid.cross({"adapter.dropout": (0.0, 0.1)}, {"seed": (0, 1)})
  return grid.cross(rates, grid.RATES, grid.SEEDS)


def tuned(arg: str = "") -> tuple[str, ...]:
  """What is chosen for each arm, on half of the held-out rows."""
  return ("optim.learning_rate",) if arg != "runlocal" else ()


def claims(arg: str = "") -> list[dict[str, Any]]:
  """What the page says held or did not."""
  del arg
  return [grid.same("a rate of 0.1 makes no difference",
                    {"adapter.dropout": 0.1}, {"adapter.dropout": 0.0})]
