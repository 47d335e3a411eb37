"""P-tuning v2: deep prompts without a network (arXiv 2110.07602).

  python -m experiments.run --config=configs/methods/p_tuning_v2.py
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method("p_tuning_v2", learning_rate=0.01, options="tokens=64")
