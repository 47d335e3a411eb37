"""LoRA-XS: a small matrix between singular vectors (arXiv 2405.17604).

  python -m experiments.run --config=configs/methods/lora_xs.py
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method(
      "lora_xs", learning_rate=0.003, rank=64, alpha=64.0)
