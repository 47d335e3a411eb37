"""KaSA: the noise of a weight taken out of it (arXiv 2412.06071).

  python -m experiments.run --config=configs/methods/kasa.py
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method(
      "kasa", learning_rate=0.001, rank=8, alpha=16.0,
      options="beta=1e-4,gamma=1e-3")
