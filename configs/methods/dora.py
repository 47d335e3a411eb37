"""DoRA: magnitude and direction (arXiv 2402.09353).

  python -m experiments.run --config=configs/methods/dora.py

The paper's r=32 has alpha=2r, as here.
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method("dora", learning_rate=0.001, rank=16, alpha=32.0)
