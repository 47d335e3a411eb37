"""rsLoRA: LoRA scaled by alpha/sqrt(r) (arXiv 2312.03732).

  python -m experiments.run --config=configs/methods/rslora.py
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method("rslora", learning_rate=0.001, rank=16, alpha=16.0)
