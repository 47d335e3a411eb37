"""ShadowPEFT: a small decoder beside the model (arXiv 2604.19254).

  python -m experiments.run --config=configs/methods/shadow.py

Rank, strength, dropout and the weight of its own loss are PEFT's defaults.
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method(
      "shadow", learning_rate=0.0005, rank=8, dropout=0.2,
      options="layers=1,strength=0.1,auxiliary=0.05")
