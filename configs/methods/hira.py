"""HiRA: a low-rank factor on every weight.

  python -m experiments.run --config=configs/methods/hira.py

ICLR 2025.
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method("hira", learning_rate=0.01, rank=32)
