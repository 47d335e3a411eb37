"""PVeRA: VeRA with random activations (arXiv 2512.07703).

  python -m experiments.run --config=configs/methods/pvera.py
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method(
      "pvera", learning_rate=0.01, rank=256, options="d_initial=0.1")
