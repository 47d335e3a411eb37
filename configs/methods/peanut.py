"""PEANuT: a network of the weight is its change (arXiv 2410.01870).

  python -m experiments.run --config=configs/methods/peanut.py
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method("peanut", learning_rate=0.001, rank=16)
