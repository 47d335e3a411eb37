"""Prompt tuning: trained virtual tokens (arXiv 2104.08691).

  python -m experiments.run --config=configs/methods/prompt.py

The paper has up to 100 tokens, and Adafactor at 0.3.
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method(
      "prompt", learning_rate=0.03, options="tokens=20,start=vocabulary")
