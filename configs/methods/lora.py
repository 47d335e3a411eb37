"""LoRA: low-rank adaptation (arXiv 2106.09685).

  python -m experiments.run --config=configs/methods/lora.py

Rank and alpha as commonly used; the paper's language models have r=4,
alpha=32.
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method("lora", learning_rate=0.001, rank=16, alpha=32.0)
