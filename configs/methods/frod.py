"""FRoD: sparse changes in a basis that layers share (arXiv 2512.23485).

  python -m experiments.run --config=configs/methods/frod.py
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method(
      "frod", learning_rate=0.003, targets="attention",
      options="sparse_rate=0.01")
