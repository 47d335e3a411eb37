"""Several methods in one model, on the quickstart's model and data.

  python -m experiments.run --config=configs/hybrid.py
  python -m experiments.run --config=configs/hybrid.py:kind=mam \\
      --config.hybrid.parallel.rank=32

  kind=lora_houlsby  LoRA on all linears, bottlenecks after attention and MLP
  kind=mam           prefixes in attention and a scaled parallel adapter beside
                     the MLP: the mix-and-match adapter of He et al. 2022,
                     arXiv 2110.04366 (there 30 tokens and r=512)

The adapter block comes first; what `hybrid` has of others adapts what it
leaves (lora_jax/adapters/several.py). Each is saved in a folder of its own.
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import common


def get_config(arg: str = "") -> config_dict.ConfigDict:
  """One of the two."""
  chosen = common.parse(arg, kind=("lora_houlsby", "mam"))
  if chosen.get("kind") == "mam":
    config = common.method("prefix", 1e-3, options="tokens=30")
    config.hybrid.parallel = common.adapter(method="parallel", rank=64)
    return config
  config = common.method("lora", 1e-3, rank=8)
  config.hybrid.houlsby = common.adapter(method="houlsby", rank=8)
  return config
