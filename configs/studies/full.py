"""Does LoRA learn less than full fine-tuning, and forget less?

  python -m experiments.sweep --config=configs/studies/full.py
  python -m experiments.sweep --config=configs/studies/full.py:runlocal

Published: "LoRA Learns Less and Forgets Less" (arXiv 2405.09673): full
fine-tuning is better in code and mathematics, LoRA forgets less of HellaSwag,
ARC and WinoGrande. Here forgetting is how much the loss of encyclopedia
passages (BoolQ's) rises.

Prediction: at equal steps full fine-tuning forgets at least twice as much as
LoRA of rank 16; held-out losses are within 0.01 nats.

Verdict: "better" holds if the 95% interval of the difference is below 0, "no
difference" if the 90% interval is within 0.01 nats.
"""

from __future__ import annotations

from typing import Any

from ml_collections import config_dict

from configs import common
from configs import grid

LORA = {"adapter.method": "lora"}
FULL = {"adapter.method": "full"}


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """The run that all cells are changes of."""
  config = common.study(local=arg == "runlocal")
  config.quant.format = "none"  # What is quantised cannot be trained.
  config.data.watch_path = "asset:boolq"
  config.data.watch_format = "text"
  config.data.watch_rows = 16 if arg == "runlocal" else 200
  return config


def sweep(arg: str = "") -> grid.Cells:
  """Each at learning rates of its own."""
  if arg == "runlocal":
    return grid.zipped({"adapter.method": ("lora", "full"),
                        "optim.learning_rate": (1e-3, 1e-4)})
  return grid.cross(
      grid.cross([LORA], {"optim.learning_rate": (1e-3, 3e-3)})
      + grid.cross([FULL], {"optim.learning_rate": (3e-5, 1e-4, 3e-4)}),
      {"seed": (0, 1, 2)})


def tuned(arg: str = "") -> tuple[str, ...]:
  """What is chosen for each arm, on half of the held-out rows."""
  del arg
  return ("optim.learning_rate",)


def claims(arg: str = "") -> list[dict[str, Any]]:
  """What the page says held or did not."""
  del arg
  return [
      grid.rises("full fine-tuning forgets", FULL),
      grid.better("LoRA forgets at most half of what full fine-tuning does",
                  LORA, FULL, of="watched", times=0.5),
      grid.same("LoRA learns as much", LORA, FULL),
  ]
