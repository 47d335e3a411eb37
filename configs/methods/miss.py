"""MiSS: one shard, shared by all blocks of rows (arXiv 2409.15371).

  python -m experiments.run --config=configs/methods/miss.py
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method("miss", learning_rate=0.001, rank=64)
