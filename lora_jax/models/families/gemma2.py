"""Gemma 2: four norms a layer, soft caps, a window on every other layer.

Source: Gemma Team 2024 (2408.00118), section 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_jax import errors
from lora_jax.models import config as config_lib
from lora_jax.models.families import common

# What transformers' class has where a config says nothing.
DEFAULTS = {
    "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216,
    "num_hidden_layers": 26, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192, "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256, "sliding_window": 4096,
    "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0,
}


def from_hf(
    hf: Mapping[str, Any], source: str = "config.json"
) -> config_lib.ModelConfig:
  """`ModelConfig` of a `Gemma2Config`; see `common` for the errors."""
  hf = {**DEFAULTS, **hf}
  return config_lib.ModelConfig(
      family="gemma2", **block(hf, source, pattern=2),
      **common.geometry(
          hf, source, n_kv_heads=4, head_dim=256, max_position=8192),
      **common.token_ids(hf, bos=2, eos=1))


def block(
    hf: Mapping[str, Any], source: str, pattern: int) -> dict[str, Any]:
  """The fields that Gemma 2 and 3 have in common.

  Args:
    hf: `config.json`, defaults filled in.
    source: its path, for messages.
    pattern: every `pattern`-th layer has no window, if the file does not say.

  Returns:
    Keyword arguments of `ModelConfig`.

  Raises:
    errors.UserError: if a value is missing, malformed or unsupported.
  """
  if hf.get("use_bidirectional_attention"):
    raise errors.UserError(
        f"{source}: use_bidirectional_attention=true is unsupported; only "
        "causal models are")
  n_layers = common.integer(hf, "num_hidden_layers", source)
  window = hf.get("sliding_window")
  local: tuple[bool, ...] | None = None
  if window is not None:
    window = common.integer(hf, "sliding_window", source)
    kinds = hf.get("layer_types") or [
        "sliding_attention" if (i + 1) % pattern else "full_attention"
        for i in range(n_layers)]
    local = common.local_layers(kinds, source, n_layers)

  def cap(name):
    return (None if hf.get(name) is None
            else common.number(hf, name, source))

  biased = bool(hf.get("attention_bias", False))
  return {
      "norm_offset": 1,
      "post_norms": True,
      "embed_scale": common.integer(hf, "hidden_size", source) ** 0.5,
      "query_pre_attn_scalar": common.integer(
          hf, "query_pre_attn_scalar", source),
      "attn_softcap": cap("attn_logit_softcapping"),
      "final_softcap": cap("final_logit_softcapping"),
      "sliding_window": window,
      "window_layers": local,
      "qkv_bias": biased,
      "o_bias": biased,
  }
