"""Mistral: Llama with a sliding window on every layer, or on none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_jax.models import config as config_lib
from lora_jax.models.families import common


def from_hf(
    hf: Mapping[str, Any], source: str = "config.json"
) -> config_lib.ModelConfig:
  """`ModelConfig` of a `MistralConfig`; see `common` for the errors."""
  # Absent means 4096 (version 0.1), null means none (0.2 and later).
  window = hf.get("sliding_window", 4096)
  if window is not None:
    window = common.integer(hf, "sliding_window", source, 4096)
  return config_lib.ModelConfig(
      family="mistral", sliding_window=window,
      **common.geometry(
          hf, source, n_kv_heads=8, head_dim=None, max_position=131072),
      **common.token_ids(hf, bos=1, eos=2))
