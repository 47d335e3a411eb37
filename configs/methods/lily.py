"""Lily: A and B that layers share, and a router (arXiv 2407.09946).

  python -m experiments.run --config=configs/methods/lily.py

Hugging Face PEFT recommends two to four times LoRA's rank, an A for two to
four layers, and about as many B as A.
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method(
      "lily", learning_rate=0.001, rank=32,
      options="stride_A=4,num_B=8,scaling=1.0")
