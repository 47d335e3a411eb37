"""SHiRA: a sparse change (arXiv 2406.13175).

  python -m experiments.run --config=configs/methods/shira.py
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method("shira", learning_rate=0.001, rank=16)
