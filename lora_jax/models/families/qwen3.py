"""Qwen3: RMSNorm on the heads of q and k; head size free of d / h."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_jax.models import config as config_lib
from lora_jax.models.families import common


def from_hf(
    hf: Mapping[str, Any], source: str = "config.json"
) -> config_lib.ModelConfig:
  """`ModelConfig` of a `Qwen3Config`; see `common` for the errors."""
  biased = bool(hf.get("attention_bias", False))
  shape = common.geometry(
      hf, source, n_kv_heads=32, head_dim=128, max_position=32768)
  return config_lib.ModelConfig(
      family="qwen3", qk_norm=True, qkv_bias=biased, o_bias=biased, **shape,
      **common.layer_windows(hf, source, shape["n_layers"]),
      **common.token_ids(hf, bos=None, eos=None))
