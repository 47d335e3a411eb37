"""RandLoRA: full rank out of random bases (arXiv 2502.00987).

  python -m experiments.run --config=configs/methods/randlora.py
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method("randlora", learning_rate=0.001, rank=32, alpha=640.0)
