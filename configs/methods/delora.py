"""DeLoRA: a bounded low-rank change (arXiv 2503.18225).

  python -m experiments.run --config=configs/methods/delora.py
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method(
      "delora", learning_rate=0.01, rank=16, options="delora_lambda=15")
