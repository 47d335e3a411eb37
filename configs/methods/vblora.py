"""VB-LoRA: parts of one vector bank (arXiv 2405.15179).

  python -m experiments.run --config=configs/methods/vblora.py

The paper's bank has 2048 vectors of 256; SmolLM2's widths allow 64.
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method(
      "vblora", learning_rate=0.003, rank=4,
      options="num_vectors=256,vector_length=64,topk=2")
