"""Prefix tuning: trained keys and values in every layer (arXiv 2101.00190).

  python -m experiments.run --config=configs/methods/prefix.py
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method("prefix", learning_rate=0.01, options="tokens=20")
