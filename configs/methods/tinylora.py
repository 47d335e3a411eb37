"""TinyLoRA: a few numbers between singular vectors (arXiv 2602.04118).

  python -m experiments.run --config=configs/methods/tinylora.py

The paper's rank. Its 13 numbers for a whole model are for reinforcement
learning of 7B: --config.adapter.options=u=13,weight_tying=1.0
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method(
      "tinylora", learning_rate=0.01, rank=2, options="u=64")
