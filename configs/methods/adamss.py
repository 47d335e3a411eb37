"""AdaMSS: low-rank changes of clusters of outputs (openreview 8ZdWmpYxT0).

  python -m experiments.run --config=configs/methods/adamss.py
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method(
      "adamss", learning_rate=0.003, rank=100,
      options="num_subspaces=5,subspace_rank=1")
