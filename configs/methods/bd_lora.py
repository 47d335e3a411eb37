"""BD-LoRA: LoRA in blocks, for serving on several devices (PEFT).

  python -m experiments.run --config=configs/methods/bd_lora.py
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method(
      "bd_lora", learning_rate=0.001, rank=16, alpha=32.0,
      options="nblocks=2")
