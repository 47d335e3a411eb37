"""Does the start of A and B matter on an NF4 base?

  python -m experiments.run --config=configs/pretrain_tiny.py \\
      --workdir=runs/pretrain_tiny
  python -m experiments.sweep --config=configs/studies/starts.py
  python -m experiments.sweep --config=configs/studies/starts.py:runlocal

The base is a small one in full precision (docs/TINY.md), which the first
command makes; :runlocal needs none.

Published: PiSSA (arXiv 2404.02948): 72.86 on GSM8K, LoRA 67.7. LoftQ
(2310.08659) starts where the quantised base and A B are nearest to the
weights.

Prediction: LoftQ and PiSSA are better than the default at rank 16 by 10 to 30%
of what NF4 loses, of a base in full precision.

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
  config = common.study(local=arg == "runlocal")
  if arg != "runlocal":
    config.model.path = "runs/pretrain_tiny/model"
  return config


def sweep(arg: str = "") -> grid.Cells:
  """Starts x learning rates x seeds; and the base without quantisation."""
  starts = grid.cross({"adapter.init": (
      "default", "gaussian", "pissa_niter_4", "loftq", "olora")})
  starts.append({"adapter.init": "default", "quant.format": "none"})
  if arg == "runlocal":
    return grid.cross({"adapter.init": ("default", "gaussian")})
  return grid.cross(starts, grid.TWO_RATES, grid.SEEDS)


def tuned(arg: str = "") -> tuple[str, ...]:
  """What is chosen for each arm, on half of the held-out rows."""
  return ("optim.learning_rate",) if arg != "runlocal" else ()


def claims(arg: str = "") -> list[dict[str, Any]]:
  """What the page says held or did not."""
  if arg == "runlocal":
    return [grid.same("gaussian is as the default",
                      {"adapter.init": "gaussian"},
                      {"adapter.init": "default"})]
  return [
      grid.better("LoftQ is better than the default",
                  {"adapter.init": "loftq"}, {"adapter.init": "default"}),
      grid.better("PiSSA is better than the default",
                  {"adapter.init": "pissa_niter_4"},
                  {"adapter.init": "default"}),
      grid.better("NF4 loses something: what there is to win",
                  {"adapter.init": "default", "quant.format": "none"},
                  {"adapter.init": "default"}),
  ]
