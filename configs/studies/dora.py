"""Is DoRA better than LoRA?

  python -m experiments.sweep --config=configs/studies/dora.py
  python -m experiments.sweep --config=configs/studies/dora.py:runlocal

Published: DoRA (arXiv 2402.09353, table 15, ranks 4 to 64): LoRA 39.5, 40.7,
70.9, 74.7, 65.8 against DoRA's 61.9, 77.9, 77.5, 78.4, 72.1, at one learning
rate.

Prediction: no difference from rank 8 on once each has its own learning rate;
up to 0.02 nats at rank 4 and below.

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
  """Methods x ranks x learning rates x seeds."""
  methods = {"adapter.method": ("lora", "dora")}
  if arg == "runlocal":
    return grid.cross(methods, {"adapter.rank": (4,)})
  return grid.cross(methods, {"adapter.rank": (2, 4, 8, 16)}, grid.TWO_RATES,
                    grid.SEEDS)


def tuned(arg: str = "") -> tuple[str, ...]:
  """What is chosen for each arm, on half of the held-out rows."""
  return ("optim.learning_rate",) if arg != "runlocal" else ()


def claims(arg: str = "") -> list[dict[str, Any]]:
  """What the page says held or did not."""
  def pair(rank):
    return [{"adapter.method": name, "adapter.rank": rank}
            for name in ("dora", "lora")]

  if arg == "runlocal":
    return [grid.better("DoRA is better at rank 4", *pair(4))]
  return [
      grid.better("DoRA is better at rank 2", *pair(2)),
      grid.same("DoRA is as LoRA at rank 8", *pair(8)),
      grid.same("DoRA is as LoRA at rank 16", *pair(16)),
  ]
