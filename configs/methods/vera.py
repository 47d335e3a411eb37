"""VeRA: vectors between shared random matrices (arXiv 2310.11454).

  python -m experiments.run --config=configs/methods/vera.py
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method(
      "vera", learning_rate=0.01, rank=256, options="d_initial=0.1")
