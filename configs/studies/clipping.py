"""Does clipping the gradient's norm matter?

  python -m experiments.sweep --config=configs/studies/clipping.py
  python -m experiments.sweep --config=configs/studies/clipping.py:runlocal

Published: QLoRA (arXiv 2305.14314, appendix B.2) clips at 0.3, others at 1.
Adam's steps hardly depend on the gradient's size.

Prediction: no difference at the usual learning rates; norms are logged as
`grad_norm`.

Verdict: "no difference" holds if the 90% interval is within 0.01 nats.
"""

from __future__ import annotations

from typing import Any

from ml_collections import config_dict

from configs import common
from configs import grid

FIELD = "optim.clip_norm"


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """The run that all cells are changes of."""
  return common.study(local=arg == "runlocal")


def sweep(arg: str = "") -> grid.Cells:
  """Norms (0 is off) x learning rates x seeds."""
  if arg == "runlocal":
    return grid.cross({FIELD: (0.0, 0.3)})
  return grid.cross({FIELD: (0.0, 0.3, 1.0)}, grid.RATES, grid.SEEDS)


def tuned(arg: str = "") -> tuple[str, ...]:
  """What is chosen for each arm, on half of the held-out rows."""
  return ("optim.learning_rate",) if arg != "runlocal" else ()


def claims(arg: str = "") -> list[dict[str, Any]]:
  """What the page says held or did not."""
  del arg
  return [grid.same("clipping at 0.3 is as none", {FIELD: 0.3}, {FIELD: 0.0})]
