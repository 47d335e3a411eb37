"""A cartridge: a cache of keys and values that is trained (arXiv 2506.06266).

  python -m experiments.run --config=configs/methods/cartridge.py

The paper's are of 128 to 8192 tokens, the first of which is not trained.
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method(
      "cartridge", learning_rate=0.02, options="tokens=128,frozen=1")
