"""A mixture of LoRAs behind a router (arXiv 2309.05444).

  python -m experiments.run --config=configs/methods/mixture.py
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method(
      "mixture", learning_rate=0.001, rank=8, alpha=16.0, options="experts=4")
