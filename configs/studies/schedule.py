"""Does the schedule matter?

  python -m experiments.sweep --config=configs/studies/schedule.py
  python -m experiments.sweep --config=configs/studies/schedule.py:runlocal

Published: none with numbers to compare with; QLoRA (arXiv 2305.14314) trains
at a constant rate.

Prediction: cosine, linear and wsd do not differ; a constant rate is worse by
more than 0.01 nats.

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
  """Schedules x learning rates x seeds."""
  names = {"optim.schedule": ("cosine", "linear", "wsd", "constant")}
  if arg == "runlocal":
    return grid.cross({"optim.schedule": ("cosine", "constant")},
                      {"seed": (0, 1)})
  return grid.cross(names, grid.RATES, grid.SEEDS)


def tuned(arg: str = "") -> tuple[str, ...]:
  """What is chosen for each arm, on half of the held-out rows."""
  return ("optim.learning_rate",) if arg != "runlocal" else ()


def claims(arg: str = "") -> list[dict[str, Any]]:
  """What the page says held or did not."""
  found = [grid.better("cosine is better than a constant rate",
                       {"optim.schedule": "cosine"},
                       {"optim.schedule": "constant"})]
  if arg != "runlocal":
    found.append(grid.same("linear is as cosine", {"optim.schedule": "linear"},
                           {"optim.schedule": "cosine"}))
  return found
