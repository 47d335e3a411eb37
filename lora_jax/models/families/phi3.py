"""Phi-3, Phi-3.5 and Phi-4: Llama with fused projections and LongRoPE.

Source: Abdin et al. 2024 (2404.14219), section 2. Checkpoints hold q, k, v and
gate, up as one matrix each; here they are projections of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_jax.models import config as config_lib
from lora_jax.models.families import common

# Names that early checkpoints have for LongRoPE.
LONGROPE = ("su", "yarn")


def from_hf(
    hf: Mapping[str, Any], source: str = "config.json"
) -> config_lib.ModelConfig:
  """`ModelConfig` of a `Phi3Config`; see `common` for the errors."""
  hf = {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096, **hf}
  for name in ("rope_scaling", "rope_parameters"):
    given = hf.get(name) or {}
    if (given.get("rope_type") or given.get("type")) in LONGROPE:
      hf[name] = {**given, "rope_type": "longrope"}
  window = hf.get("sliding_window")
  if window is not None:
    window = common.integer(hf, "sliding_window", source)
  return config_lib.ModelConfig(
      family="phi3", fused=True, sliding_window=window,
      **common.geometry(
          hf, source, n_kv_heads=None, head_dim=None, max_position=4096),
      **common.token_ids(hf, bos=1, eos=32000))
