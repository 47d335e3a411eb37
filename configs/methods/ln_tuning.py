"""LayerNorm tuning: norms' scales only (arXiv 2312.11420).

  python -m experiments.run --config=configs/methods/ln_tuning.py
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method("ln_tuning", learning_rate=0.001)
