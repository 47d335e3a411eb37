"""LoRA-FA: LoRA with A frozen (arXiv 2308.03303).

  python -m experiments.run --config=configs/methods/lora_fa.py
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method(
      "lora_fa", learning_rate=0.003, rank=16, alpha=32.0,
      options="projected=false")
