"""Gemma 3: Gemma 2 with QK-norm in place of caps, and RoPE by layer type.

Five layers in six have a window, and a RoPE of their own.

Source: Gemma Team 2025 (2503.19786), section 2. Of a multimodal checkpoint
(`gemma3`) the text model is read; images are not supported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_jax import errors
from lora_jax.models import config as config_lib
from lora_jax.models.families import common
from lora_jax.models.families import gemma2

# What transformers' class has where a config says nothing.
DEFAULTS = gemma2.DEFAULTS | {
    "vocab_size": 262208, "max_position_embeddings": 131072,
    "final_logit_softcapping": None, "attn_logit_softcapping": None,
}
GLOBAL_THETA, LOCAL_THETA = 1e6, 1e4


def from_hf(
    hf: Mapping[str, Any], source: str = "config.json"
) -> config_lib.ModelConfig:
  """`ModelConfig` of a `Gemma3TextConfig`; see `common` for the errors."""
  hf = {**DEFAULTS, **hf}
  pattern = common.integer(hf, "sliding_window_pattern", source, 6)
  far, near = _ropes(hf, source)
  flat = {k: v for k, v in hf.items()
          if k not in ("rope_parameters", "rope_scaling", "rope_theta")}
  return config_lib.ModelConfig(
      family="gemma3_text", qk_norm=True,
      local_rope=common.rope_config(
          {"rope_parameters": near}, source, hf["max_position_embeddings"],
          hf["head_dim"]),
      **gemma2.block(hf, source, pattern),
      **common.geometry(
          flat | {"rope_parameters": far}, source, n_kv_heads=4,
          head_dim=256, max_position=131072),
      **common.token_ids(hf, bos=2, eos=1))


def from_multimodal(
    hf: Mapping[str, Any], source: str = "config.json"
) -> config_lib.ModelConfig:
  """`ModelConfig` of the text model in a `Gemma3Config`."""
  text = hf.get("text_config")
  if not isinstance(text, Mapping):
    raise errors.UserError(
        f"{source}: text_config is missing; download the file again")
  # The tokens that end a turn are said outside; the text's are defaults.
  outer = {k: hf[k] for k in ("bos_token_id", "eos_token_id") if k in hf}
  return from_hf({**text, **outer}, source)


def _ropes(hf, source) -> tuple[dict[str, Any], dict[str, Any]]:
  """RoPE of the global and of the local layers, as `rope_parameters`."""
  given = hf.get("rope_parameters") or {}
  unknown = set(given) - {"full_attention", "sliding_attention"}
  if unknown:
    raise errors.UserError(
        f'{source}: rope_parameters["{min(unknown)}"] is not a layer type; '
        "supported: full_attention, sliding_attention")
  far = {"rope_theta": hf.get("rope_theta") or GLOBAL_THETA,
         **(given.get("full_attention") or {}),
         **(hf.get("rope_scaling") or {})}
  near = {"rope_theta": hf.get("rope_local_base_freq") or LOCAL_THETA,
          **(given.get("sliding_attention") or {})}
  return far, near
