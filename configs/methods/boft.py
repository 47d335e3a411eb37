"""BOFT: butterflies of rotations (arXiv 2311.06243).

  python -m experiments.run --config=configs/methods/boft.py
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method(
      "boft", learning_rate=0.001, options="block_size=4,factors=2")
