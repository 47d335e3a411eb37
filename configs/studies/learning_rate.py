"""Does the best learning rate depend on the rank?

  python -m experiments.sweep --config=configs/studies/learning_rate.py
  python -m experiments.sweep --config=configs/studies/learning_rate.py:runlocal

Published: "LoRA Without Regret" (Thinking Machines, 2025): the best learning
rate moves by less than a factor of 2 from rank 4 to 512, and is 9.8 times that
of full fine-tuning.

Prediction: the lowest loss of every rank lies within one step (a factor of
about three) of the same learning rate.

Verdict: "better" holds if the 95% interval of the difference is below 0.
"""

from __future__ import annotations

from typing import Any

from ml_collections import config_dict

from configs import common
from configs import grid

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """The run that all cells are changes of."""
  return common.study(local=arg == "runlocal")


def sweep(arg: str = "") -> grid.Cells:
  """Ranks x learning rates x seeds: a map."""
  if arg == "runlocal":
    return grid.cross({"adapter.rank": (2, 8)},
                      {"optim.learning_rate": (1e-3, 3e-3)})
  return grid.cross({"adapter.rank": (1, 4, 16, 64)},
                    {"optim.learning_rate": RATES}, {"seed": (0, 1, 2)})


def claims(arg: str = "") -> list[dict[str, Any]]:
  """What the page says held or did not."""
  if arg == "runlocal":
    return []
  found = []
  for low, high in ((1, 16), (16, 64)):
    found += [
        grid.better(
            f"at rank {rank}, 3e-3 is better than 3e-4",
            {"adapter.rank": rank, "optim.learning_rate": 3e-3},
            {"adapter.rank": rank, "optim.learning_rate": 3e-4})
        for rank in (low, high)]
  return found[:1] + found[2:]
