"""Tiny configs, and the one jitted function that most tests share."""

from __future__ import annotations

import functools

import jax
import numpy as np

from lora_jax.models import config as config_lib
from lora_jax.models import decoder

VOCAB = 61
_SHAPE = dict(
    vocab_size=VOCAB, d_model=24, d_ff=40, n_layers=2, n_heads=4,
    n_kv_heads=2, head_dim=8, max_position=16)
_GEMMA = dict(
    norm_offset=1, post_norms=True, activation="gelu_tanh",
    embed_scale=24**0.5, query_pre_attn_scalar=6, tie_embeddings=True,
    sliding_window=5)

CONFIGS = {
    "llama": config_lib.ModelConfig(
        family="llama", **_SHAPE, mlp_bias=True,
        rope=config_lib.RopeConfig(
            type="llama3", factor=4.0, original_max_position=16)),
    "mistral": config_lib.ModelConfig(
        family="mistral", **_SHAPE, sliding_window=5),
    "qwen2": config_lib.ModelConfig(
        family="qwen2", **_SHAPE, qkv_bias=True, tie_embeddings=True,
        rope=config_lib.RopeConfig(
            type="yarn", factor=4.0, original_max_position=16)),
    "qwen3": config_lib.ModelConfig(
        family="qwen3", **_SHAPE, qk_norm=True, sliding_window=6,
        window_layers=(False, True)),
    "gemma2": config_lib.ModelConfig(
        family="gemma2", **_SHAPE, **_GEMMA, window_layers=(True, False),
        attn_softcap=2.0, final_softcap=10.0),
    "gemma3_text": config_lib.ModelConfig(
        family="gemma3_text", **_SHAPE, **_GEMMA, qk_norm=True,
        window_layers=(True, False),
        rope=config_lib.RopeConfig(type="linear", theta=1e6, factor=8.0),
        local_rope=config_lib.RopeConfig(theta=100.0)),
    "phi3": config_lib.ModelConfig(
        # Its class in transformers takes e for d / h.
        family="phi3", **_SHAPE | dict(d_model=32), fused=True,
        sliding_window=7,
        # Every sequence of the tests is beyond the original context.
        rope=config_lib.RopeConfig(
            type="longrope", factor=8.0, original_max_position=2,
            partial=0.75, short_factor=(1.0, 1.5, 2.0),
            long_factor=(2.0, 3.0, 5.0))),
}


@functools.partial(jax.jit, static_argnums=0)
def logits(config, base, tokens, positions, segments, adapters=None):
  """Logits `[b, t, v]` without a cache."""
  hidden, _ = decoder.forward(
      config, base, adapters, tokens, positions, segments)
  return decoder.unembed(config, base, adapters, hidden)


@functools.partial(jax.jit, static_argnums=0)
def cached_logits(config, base, tokens, positions, segments, cache):
  """Logits `[b, t, v]` and the cache after these tokens."""
  hidden, cache = decoder.forward(
      config, base, None, tokens, positions, segments, cache=cache)
  return decoder.unembed(config, base, None, hidden), cache


def distance(ours, reference) -> float:
  """max|difference| / max|reference|."""
  ours, reference = np.asarray(ours), np.asarray(reference)
  return float(np.abs(ours - reference).max() / np.abs(reference).max())
