"""Does AdaLoRA spend a budget better than equal ranks?

  python -m experiments.sweep --config=configs/studies/adalora.py
  python -m experiments.sweep --config=configs/studies/adalora.py:runlocal

Published: AdaLoRA (arXiv 2303.10512): 89.31 on GLUE, LoRA 88.34.

Prediction: no better at these lengths: its pruning takes most of the steps.

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
  """AdaLoRA from 12 to 8 and LoRA at 8 x learning rates x seeds."""
  arms = [{"adapter.method": "lora", "adapter.rank": 8},
          {"adapter.method": "adalora", "adapter.rank": 12}]
  if arg == "runlocal":
    return arms
  return grid.cross(
      arms, {"optim.learning_rate": (1e-3, 3e-3, 1e-2)}, grid.SEEDS)


def tuned(arg: str = "") -> tuple[str, ...]:
  """What is chosen for each arm, on half of the held-out rows."""
  return ("optim.learning_rate",) if arg != "runlocal" else ()


def claims(arg: str = "") -> list[dict[str, Any]]:
  """What the page says held or did not."""
  del arg
  return [grid.better("AdaLoRA is better at the same budget",
                      {"adapter.method": "adalora"},
                      {"adapter.method": "lora"})]
