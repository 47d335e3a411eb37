"""C3A: block-circulant convolution (arXiv 2407.19342).

  python -m experiments.run --config=configs/methods/c3a.py

Blocks of 64 divide SmolLM2's widths.
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method("c3a", learning_rate=0.01, options="block_size=64")
