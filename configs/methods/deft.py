"""DEFT: decompositional fine-tuning.

  python -m experiments.run --config=configs/methods/deft.py
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method("deft", learning_rate=0.001, rank=16)
