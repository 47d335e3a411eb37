"""Which 4-bit format loses least?

  python -m experiments.run --config=configs/pretrain_tiny.py \\
      --workdir=runs/pretrain_tiny
  python -m experiments.sweep --config=configs/studies/formats.py
  python -m experiments.sweep --config=configs/studies/formats.py:runlocal

The base is a small one in full precision (docs/TINY.md), which the first
command makes; :runlocal needs none.

Published: QLoRA (arXiv 2305.14314, table 2): mean perplexity 34.34 of Int4,
31.07 of Float4 (E2M1), 29.48 of Float4 (E3M0), 27.41 of NF4 with double
quantisation.

Prediction: the untrained model loses least in NF4, then FP4, then Int4. Of a
base whose weights were 4-bit already (the packaged SmolLM2, as in :runlocal)
nothing would follow. --set=model.path=... takes another one.

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
  config = common.study_of_formats(local=arg == "runlocal")
  config.train.steps = 0
  config.adapter.method = "none"
  return config


def sweep(arg: str = "") -> grid.Cells:
  """Formats, nothing trained."""
  del arg
  return grid.cross({"quant.format": ("none", "nf4", "fp4", "int4", "int8")})


def claims(arg: str = "") -> list[dict[str, Any]]:
  """What the page says held or did not."""
  del arg
  return [
      grid.better("NF4 loses less than FP4", {"quant.format": "nf4"},
                  {"quant.format": "fp4"}),
      grid.better("NF4 loses less than Int4", {"quant.format": "nf4"},
                  {"quant.format": "int4"}),
      grid.same("int8 loses nothing", {"quant.format": "int8"},
                {"quant.format": "none"}),
  ]
