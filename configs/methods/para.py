"""PaRa: the projection out of a trained subspace.

  python -m experiments.run --config=configs/methods/para.py
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method("para", learning_rate=0.001, rank=4)
