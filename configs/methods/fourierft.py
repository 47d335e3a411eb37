"""FourierFT: a few entries of a spectrum (arXiv 2405.03003).

  python -m experiments.run --config=configs/methods/fourierft.py
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method(
      "fourierft", learning_rate=0.03,
      options="n_frequency=1000,scaling=300")
