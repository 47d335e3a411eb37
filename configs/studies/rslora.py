"""Does the scale alpha / sqrt(r) help?

  python -m experiments.sweep --config=configs/studies/rslora.py
  python -m experiments.sweep --config=configs/studies/rslora.py:runlocal

Published: rsLoRA (arXiv 2312.03732): with it, higher ranks train better.

Prediction: it differs at a shared learning rate, and not once each has its
own.

Verdict: "no difference" holds if the 90% interval is within 0.01 nats.
"""

from __future__ import annotations

from typing import Any

from ml_collections import config_dict

from configs import common
from configs import grid


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """The run that all cells are changes of."""
  config = common.study(local=arg == "runlocal")
  config.adapter.rank = 16 if arg == "runlocal" else 64
  return config


def sweep(arg: str = "") -> grid.Cells:
  """Methods x learning rates x seeds at rank 64."""
  methods = {"adapter.method": ("lora", "rslora")}
  if arg == "runlocal":
    return grid.cross(methods)
  return grid.cross(methods, grid.RATES, grid.SEEDS)


def tuned(arg: str = "") -> tuple[str, ...]:
  """What is chosen for each arm, on half of the held-out rows."""
  return ("optim.learning_rate",) if arg != "runlocal" else ()


def claims(arg: str = "") -> list[dict[str, Any]]:
  """What the page says held or did not."""
  del arg
  return [grid.same("tuned, the scale makes no difference",
                    {"adapter.method": "rslora"}, {"adapter.method": "lora"})]
