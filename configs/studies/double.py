"""Does double quantisation cost anything?

  python -m experiments.run --config=configs/pretrain_tiny.py \\
      --workdir=runs/pretrain_tiny
  python -m experiments.sweep --config=configs/studies/double.py
  python -m experiments.sweep --config=configs/studies/double.py:runlocal

The base is a small one in full precision (docs/TINY.md), which the first
command makes; :runlocal needs none.

Published: QLoRA (arXiv 2305.14314): double quantisation saves 0.37 bits a
parameter, at no loss.

Prediction: no difference, before or after training.

Verdict: "no difference" holds if the 90% interval is within 0.01 nats.
"""

from __future__ import annotations

from typing import Any

from ml_collections import config_dict

from configs import common
from configs import grid


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """The run that all cells are changes of."""
  return common.study_of_formats(local=arg == "runlocal")


def sweep(arg: str = "") -> grid.Cells:
  """With and without, x seeds."""
  if arg == "runlocal":
    return grid.cross({"quant.double": (False, True)})
  return grid.cross({"quant.double": (False, True)}, grid.RATES, grid.SEEDS)


def tuned(arg: str = "") -> tuple[str, ...]:
  """What is chosen for each arm, on half of the held-out rows."""
  return ("optim.learning_rate",) if arg != "runlocal" else ()


def claims(arg: str = "") -> list[dict[str, Any]]:
  """What the page says held or did not."""
  return [grid.same("double quantisation costs nothing",
                    {"quant.double": True}, {"quant.double": False})]
