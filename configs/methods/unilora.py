"""Uni-LoRA: one vector for all factors (arXiv 2506.00799).

  python -m experiments.run --config=configs/methods/unilora.py

The paper's rank; its vectors have 23,040 entries (RoBERTa) and 524,288 (7B).
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method(
      "unilora", learning_rate=0.005, rank=4,
      options="theta_d_length=23040")
