"""LoHa: a Hadamard product of low-rank matrices (arXiv 2108.06098).

  python -m experiments.run --config=configs/methods/loha.py
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method("loha", learning_rate=0.001, rank=8, alpha=8.0)
