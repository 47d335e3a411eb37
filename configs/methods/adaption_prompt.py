"""LLaMA-Adapter in PEFT's form (arXiv 2303.16199).

  python -m experiments.run --config=configs/methods/adaption_prompt.py
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method(
      "adaption_prompt", learning_rate=0.01, options="tokens=10")
