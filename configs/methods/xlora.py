"""LoRAs that a classifier mixes, token by token (arXiv 2402.07148).

  python -m experiments.run --config=configs/methods/xlora.py

The paper's experts are trained before; these are trained with the classifier.
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method(
      "xlora", learning_rate=0.001, rank=8, alpha=16.0,
      options="experts=4,depth=2,size=256,layerwise=true")
