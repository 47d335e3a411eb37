"""PSOFT: orthogonal tuning of a principal subspace (openreview FSHrinMArK).

  python -m experiments.run --config=configs/methods/psoft.py
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method("psoft", learning_rate=0.003, rank=64)
