"""AdaLoRA: a budget of ranks, spent where it matters (arXiv 2303.10512).

  python -m experiments.run --config=configs/methods/adalora.py

Ranks begin at 12 and end at 8 on average.
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method(
      "adalora", learning_rate=0.003, rank=12, alpha=32.0,
      options="target_r=8,tinit=4,tfinal=12,delta_t=1")
