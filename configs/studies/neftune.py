"""Does noise on the embeddings help?

  python -m experiments.sweep --config=configs/studies/neftune.py
  python -m experiments.sweep --config=configs/studies/neftune.py:runlocal

Published: NEFTune (arXiv 2310.05914): LLaMA-2 7B on Alpaca, AlpacaEval win rate
29.8% without, 64.7% with noise; OpenLLM leaderboard tasks unchanged. Answers
become longer; the paper shows a higher training loss and a lower test loss.

Prediction: no change of the held-out loss.

Verdict: "no difference" holds if the 90% interval is within 0.01 nats.
"""

from __future__ import annotations

from typing import Any

from ml_collections import config_dict

from configs import common
from configs import grid

FIELD = "train.neftune_noise_alpha"


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """The run that all cells are changes of."""
  return common.study(local=arg == "runlocal")


def sweep(arg: str = "") -> grid.Cells:
  """Alphas of the paper x learning rates x seeds."""
  if arg == "runlocal":
    return grid.cross({FIELD: (0.0, 5.0)})
  return grid.cross(
      {FIELD: (0.0, 5.0, 10.0, 15.0)}, grid.TWO_RATES, {"seed": (0, 1, 2)})


def tuned(arg: str = "") -> tuple[str, ...]:
  """What is chosen for each arm, on half of the held-out rows."""
  return () if arg == "runlocal" else ("optim.learning_rate",)


def claims(arg: str = "") -> list[dict[str, Any]]:
  """What the page says held or did not."""
  del arg
  return [grid.same("noise changes no held-out loss", {FIELD: 5.0},
                    {FIELD: 0.0})]
