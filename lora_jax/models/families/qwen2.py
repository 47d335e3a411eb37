"""Qwen2 and Qwen2.5: biases on q, k, v; a window on the upper layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_jax.models import config as config_lib
from lora_jax.models.families import common


def from_hf(
    hf: Mapping[str, Any], source: str = "config.json"
) -> config_lib.ModelConfig:
  """`ModelConfig` of a `Qwen2Config`; see `common` for the errors."""
  shape = common.geometry(
      hf, source, n_kv_heads=32, head_dim=None, max_position=32768)
  return config_lib.ModelConfig(
      family="qwen2", qkv_bias=True, **shape,
      **common.layer_windows(hf, source, shape["n_layers"]),
      **common.token_ids(hf, bos=None, eos=None))
