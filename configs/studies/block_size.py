"""How large may quantisation blocks be?

  python -m experiments.run --config=configs/pretrain_tiny.py \\
      --workdir=runs/pretrain_tiny
  python -m experiments.sweep --config=configs/studies/block_size.py
  python -m experiments.sweep --config=configs/studies/block_size.py:runlocal

The base is a small one in full precision (docs/TINY.md), which the first
command makes; :runlocal needs none.

Published: none with numbers to compare with; QLoRA (arXiv 2305.14314) uses 64.

Prediction: the trained loss rises with the block, by less than 0.01 nats from
64 to 128.

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
  """Block sizes x learning rates x seeds."""
  if arg == "runlocal":
    return grid.cross({"quant.block_size": (32, 64)})
  return grid.cross(
      {"quant.block_size": (32, 64, 128, 256)}, grid.RATES, grid.SEEDS)


def tuned(arg: str = "") -> tuple[str, ...]:
  """What is chosen for each arm, on half of the held-out rows."""
  return ("optim.learning_rate",) if arg != "runlocal" else ()


def claims(arg: str = "") -> list[dict[str, Any]]:
  """What the page says held or did not."""
  if arg == "runlocal":
    return [grid.same("64 is as good as 32", {"quant.block_size": 64},
                      {"quant.block_size": 32})]
  return [grid.same("128 is as good as 64", {"quant.block_size": 128},
                    {"quant.block_size": 64})]
