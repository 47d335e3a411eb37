"""Multitask prompt tuning (arXiv 2303.02861).

  python -m experiments.run --config=configs/methods/multitask_prompt.py

A row's task is its field `task`.
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method(
      "multitask_prompt", learning_rate=0.03, options="tokens=20,tasks=1")
