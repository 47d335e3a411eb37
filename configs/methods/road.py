"""RoAd: rotated pairs of outputs (arXiv 2409.00119).

  python -m experiments.run --config=configs/methods/road.py
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method(
      "road", learning_rate=0.003, options="variant=road_1,group_size=64")
