"""Houlsby's adapters after attention and MLP (arXiv 1902.00751).

  python -m experiments.run --config=configs/methods/houlsby.py
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method("houlsby", learning_rate=0.001, rank=64)
