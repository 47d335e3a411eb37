"""GLoRA: generalised low-rank adaptation (arXiv 2306.07967).

  python -m experiments.run --config=configs/methods/glora.py
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method("glora", learning_rate=0.001, rank=16)
