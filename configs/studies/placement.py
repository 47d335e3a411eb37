"""Attention or MLP, at equal parameters?

  python -m experiments.sweep --config=configs/studies/placement.py
  python -m experiments.sweep --config=configs/studies/placement.py:runlocal

Published: "LoRA Without Regret" (2025): attention alone at rank 256 is worse
than the MLP alone at 128; all together are about equal to the MLP.

Prediction: at equal parameters (SmolLM2: attention at rank 33 and MLP at rank
20 both have 3,801,600) the MLP is better by 0.01 to 0.05 nats.

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
  """Placements x learning rates x seeds."""
  arms = [
      {"adapter.targets": "attention", "adapter.rank": 33},
      {"adapter.targets": "mlp", "adapter.rank": 20},
      {"adapter.targets": "all-linear", "adapter.rank": 13},
  ]
  if arg == "runlocal":
    return arms
  return grid.cross(arms, grid.RATES, grid.SEEDS)


def tuned(arg: str = "") -> tuple[str, ...]:
  """What is chosen for each arm, on half of the held-out rows."""
  return ("optim.learning_rate",) if arg != "runlocal" else ()


def claims(arg: str = "") -> list[dict[str, Any]]:
  """What the page says held or did not."""
  return [
      grid.better("the MLP is better than attention",
                  {"adapter.targets": "mlp"}, {"adapter.targets": "attention"}),
      grid.same("both together are as the MLP",
                {"adapter.targets": "all-linear"}, {"adapter.targets": "mlp"}),
  ]
