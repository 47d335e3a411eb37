"""BitFit: biases only (arXiv 2106.10199).

  python -m experiments.run --config=configs/methods/bitfit.py
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method("bitfit", learning_rate=0.003)
