"""GraLoRA: LoRA in k x k blocks (arXiv 2505.20355).

  python -m experiments.run --config=configs/methods/gralora.py
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method(
      "gralora", learning_rate=0.001, rank=32, alpha=64.0,
      options="gralora_k=2")
