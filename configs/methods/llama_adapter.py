"""LLaMA-Adapter: gated attention to a prompt (arXiv 2303.16199).

  python -m experiments.run --config=configs/methods/llama_adapter.py
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  """The run."""
  return common.method("llama_adapter", learning_rate=0.01, options="tokens=10")
