"""Adapters beside the MLP (arXiv 2110.04366).

  python -m experiments.run --config=configs/methods/parallel.py
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method(
      "parallel", learning_rate=0.001, rank=64, options="scaling=4")
