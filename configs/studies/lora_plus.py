"""Does B want a larger learning rate than A?

  python -m experiments.sweep --config=configs/studies/lora_plus.py
  python -m experiments.sweep --config=configs/studies/lora_plus.py:runlocal

Published: LoRA+ (arXiv 2402.12354): 1 to 2%, and up to twice the speed.

Prediction: lower loss in as many steps at the same learning rate; less than
0.01 nats once each has its own.

Verdict: "better" holds if the 95% interval of the difference is below 0, "no
difference" if the 90% interval is within 0.01 nats.
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
  """Ratios x learning rates x seeds."""
  ratios = {"optim.lora_plus_ratio": (1.0, 4.0, 16.0)}
  if arg == "runlocal":
    return grid.cross({"optim.lora_plus_ratio": (1.0, 16.0)})
  return grid.cross(ratios, grid.RATES, grid.SEEDS)


def tuned(arg: str = "") -> tuple[str, ...]:
  """What is chosen for each arm, on half of the held-out rows."""
  return ("optim.learning_rate",) if arg != "runlocal" else ()


def claims(arg: str = "") -> list[dict[str, Any]]:
  """What the page says held or did not."""
  del arg
  return [grid.better("a ratio of 16 is better than 1",
                      {"optim.lora_plus_ratio": 16.0},
                      {"optim.lora_plus_ratio": 1.0})]
