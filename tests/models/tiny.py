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
