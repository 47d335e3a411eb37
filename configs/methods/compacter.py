"""Compacter: adapters out of Kronecker products (arXiv 2106.04647).

  python -m experiments.run --config=configs/methods/compacter.py
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method(
      "compacter", learning_rate=0.003, rank=24, options="divisor=4")
