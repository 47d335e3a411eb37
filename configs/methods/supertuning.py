"""Super-Tuning: the largest entries of a weight (arXiv 2607.09287).

  python -m experiments.run --config=configs/methods/supertuning.py
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method("supertuning", learning_rate=0.001)
