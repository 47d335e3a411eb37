"""LoRA with a bias in its up projection (PEFT's lora_bias).

  python -m experiments.run --config=configs/methods/lora_bias.py
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method(
      "lora_bias", learning_rate=0.001, rank=16, alpha=32.0)
