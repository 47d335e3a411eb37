"""LoKr: Kronecker products (arXiv 2309.14859).

  python -m experiments.run --config=configs/methods/lokr.py
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method("lokr", learning_rate=0.001, rank=8, alpha=8.0)
