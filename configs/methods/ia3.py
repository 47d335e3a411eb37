"""(IA)^3: rescaled keys, values and activations (arXiv 2205.05638).

  python -m experiments.run --config=configs/methods/ia3.py
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method("ia3", learning_rate=0.003)
