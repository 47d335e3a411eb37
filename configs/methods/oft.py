"""OFT: block-diagonal rotations of the input (arXiv 2306.07280).

  python -m experiments.run --config=configs/methods/oft.py
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method("oft", learning_rate=0.001, options="block_size=32")
