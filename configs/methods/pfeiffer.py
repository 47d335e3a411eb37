"""Pfeiffer's adapters after the MLP (arXiv 2005.00247).

  python -m experiments.run --config=configs/methods/pfeiffer.py
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method("pfeiffer", learning_rate=0.001, rank=48)
