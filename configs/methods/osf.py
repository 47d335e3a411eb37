"""OSF: fine-tuning beside the leading subspace (arXiv 2504.07097).

  python -m experiments.run --config=configs/methods/osf.py
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method(
      "osf", learning_rate=0.0003, options="effective_rank=0.9")
