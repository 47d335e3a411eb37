"""How large does the rank have to be?

  python -m experiments.sweep --config=configs/studies/rank.py
  python -m experiments.sweep --config=configs/studies/rank.py:runlocal

Published: LoRA (arXiv 2106.09685, table 6, query and value): ranks 1, 2, 4, 8,
64 have 73.4, 73.3, 73.7, 73.8, 73.5 on WikiSQL and 91.3, 91.4, 91.3, 91.6,
91.4 on MultiNLI. "LoRA Learns Less and Forgets Less" (2405.09673; code,
HumanEval): .358 at rank 16, .417 at 64, .498 at 256.

Prediction: the held-out loss falls with the rank up to 32 or 64 on mathematics
(GSM8K, `--set=data.path=...`), and is flat from rank 8 on a small instruction
set, each rank at its own learning rate.

Verdict: claims are about means over seeds and held-out rows of the half that
the learning rate was not chosen on. "Better" holds if the 95% interval of the
difference is below 0, is refuted if it is above; "no difference" holds if the
90% interval is within 0.01 nats (two one-sided tests at 5%).
"""

from __future__ import annotations

from typing import Any

from ml_collections import config_dict

from configs import common
from configs import grid

RANKS = (1, 2, 4, 8, 16, 32, 64, 128)


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """The run that all cells are changes of."""
  return common.study(local=arg == "runlocal")


def sweep(arg: str = "") -> grid.Cells:
  """Ranks x learning rates x seeds."""
  if arg == "runlocal":
    return grid.cross({"adapter.rank": (1, 8, 16)})
  return grid.cross({"adapter.rank": RANKS}, grid.TWO_RATES, grid.SEEDS)


def tuned(arg: str = "") -> tuple[str, ...]:
  """What is chosen for each arm, on half of the held-out rows."""
  return () if arg == "runlocal" else ("optim.learning_rate",)


def claims(arg: str = "") -> list[dict[str, Any]]:
  """What the page says held or did not."""
  low, middle, high = (1, 8, 16) if arg == "runlocal" else (1, 16, 64)
  return [
      grid.better("more rank helps while it is small",
                  {"adapter.rank": middle}, {"adapter.rank": low}),
      grid.same("it does not once it is large",
                {"adapter.rank": high}, {"adapter.rank": middle}),
  ]
