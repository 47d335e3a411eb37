"""Does a range test find the learning rate?

  python -m experiments.sweep --config=configs/studies/finder.py
  python -m experiments.sweep --config=configs/studies/finder.py:runlocal

Published: Smith (arXiv 1506.01186): one short run whose rate grows tells the
range in which training works. "LoRA Without Regret" (Schulman et al. 2025): the
best rate of LoRA hardly depends on its rank.

Prediction: a tenth of the rate at the lowest loss is within a factor of three
of the best of configs/studies/learning_rate.py (1e-3), at every rank. The claim
that this rate itself is was added when the first results were there.

Verdict: "between" holds if the values of all seeds are in the range, and is
refuted if none is.
"""

from __future__ import annotations

from typing import Any

from ml_collections import config_dict

from configs import common
from configs import grid


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """The run that all cells are changes of."""
  config = common.study(local=arg == "runlocal")
  config.optim.schedule = "range"
  config.optim.learning_rate = 0.1
  config.optim.final = 1e-4
  config.optim.warmup = 0.0
  config.train.log_every = 1
  return config


def sweep(arg: str = "") -> grid.Cells:
  """Ranks x seeds."""
  if arg == "runlocal":
    return grid.cross({"adapter.rank": (8, 16)})
  return grid.cross({"adapter.rank": (1, 4, 16, 64)}, {"seed": (0, 1, 2)})


def claims(arg: str = "") -> list[dict[str, Any]]:
  """What the page says held or did not."""
  ranks = (16,) if arg == "runlocal" else (1, 4, 16, 64)
  fields = {"a tenth of the rate at the lowest loss": "suggested_learning_rate",
            "that rate itself": "lowest_loss_rate"}
  return [grid.between(
      f"{text} is a good one, rank {rank}", {"adapter.rank": rank}, field,
      1e-3 / 3, 1e-3 * 3) for text, field in fields.items() for rank in ranks]
