"""Llama 1, 2 and 3, and what is built like them: SmolLM2, TinyLlama."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_jax.models import config as config_lib
from lora_jax.models.families import common


def from_hf(
    hf: Mapping[str, Any], source: str = "config.json"
) -> config_lib.ModelConfig:
  """`ModelConfig` of a `LlamaConfig`; see `common` for the errors."""
  biased = bool(hf.get("attention_bias", False))
  return config_lib.ModelConfig(
      family="llama", qkv_bias=biased, o_bias=biased,
      mlp_bias=bool(hf.get("mlp_bias", False)),
      **common.geometry(
          hf, source, n_kv_heads=None, head_dim=None, max_position=2048),
      **common.token_ids(hf, bos=1, eos=2))
