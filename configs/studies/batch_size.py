"""How large may batches be, at the same tokens?

  python -m experiments.sweep --config=configs/studies/batch_size.py
  python -m experiments.sweep --config=configs/studies/batch_size.py:runlocal

Published: "LoRA Without Regret" (2025): large batches hurt LoRA at any rank.

Prediction: the loss rises with the batch, by more than 0.01 nats from 4 to 32
rows.

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
  """Batch sizes at 1,200 rows in all x learning rates x seeds."""
  sizes = grid.zipped({"train.batch_size": (4, 8, 16, 32),
                       "train.steps": (300, 150, 75, 37)})
  if arg == "runlocal":
    return grid.zipped({"train.batch_size": (2, 4), "train.steps": (12, 6)})
  return grid.cross(sizes, {"optim.learning_rate": (1e-3, 3e-3, 1e-2)},
                    grid.SEEDS)


def tuned(arg: str = "") -> tuple[str, ...]:
  """What is chosen for each arm, on half of the held-out rows."""
  return ("optim.learning_rate",) if arg != "runlocal" else ()


def claims(arg: str = "") -> list[dict[str, Any]]:
  """What the page says held or did not."""
  low, high = (2, 4) if arg == "runlocal" else (4, 32)
  return [grid.better("small batches are better", {"train.batch_size": low},
                      {"train.batch_size": high})]
