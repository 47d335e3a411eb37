"""How many rows are enough?

  python -m experiments.sweep --config=configs/studies/data_size.py
  python -m experiments.sweep --config=configs/studies/data_size.py:runlocal

Published: none with numbers to compare with.

Prediction: the loss falls with the rows at equal steps; below a few hundred it
overfits.

Verdict: "better" holds if the 95% interval of the difference is below 0.
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
  """Rows x learning rates x seeds."""
  rows = {"data.train_rows": (100, 200, 400, 799)}
  if arg == "runlocal":
    return grid.cross({"data.train_rows": (40, 160)})
  return grid.cross(rows, grid.RATES, grid.SEEDS)


def tuned(arg: str = "") -> tuple[str, ...]:
  """What is chosen for each arm, on half of the held-out rows."""
  return ("optim.learning_rate",) if arg != "runlocal" else ()


def claims(arg: str = "") -> list[dict[str, Any]]:
  """What the page says held or did not."""
  low, high = (40, 160) if arg == "runlocal" else (100, 799)
  return [grid.better("more rows are better", {"data.train_rows": high},
                      {"data.train_rows": low})]
