"""WaveFT: a few entries of a wavelet transform (arXiv 2505.12532).

  python -m experiments.run --config=configs/methods/waveft.py
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method(
      "waveft", learning_rate=0.01, options="n_frequency=2592,scaling=25")
