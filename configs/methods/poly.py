"""Polytropon: skills that tasks mix (arXiv 2202.13914).

  python -m experiments.run --config=configs/methods/poly.py

With n_splits=8 or so it is multi-head routing (arXiv 2211.03831).
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method(
      "poly", learning_rate=0.001, rank=8,
      options="n_tasks=1,n_skills=4,n_splits=1")
