"""P-tuning: virtual tokens out of a small network (arXiv 2103.10385).

  python -m experiments.run --config=configs/methods/p_tuning.py
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method(
      "p_tuning", learning_rate=0.001, options="tokens=20,encoder=mlp")
