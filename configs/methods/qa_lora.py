"""QA-LoRA: one A for a group of inputs (arXiv 2309.14717).

  python -m experiments.run --config=configs/methods/qa_lora.py
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method(
      "qa_lora", learning_rate=0.001, rank=16, alpha=32.0,
      options="group_size=16")
