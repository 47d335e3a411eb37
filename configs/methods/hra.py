"""HRA: a chain of reflections (arXiv 2405.17484).

  python -m experiments.run --config=configs/methods/hra.py
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method("hra", learning_rate=0.003, rank=8)
