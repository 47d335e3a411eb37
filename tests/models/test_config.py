"""What a `config.json` may say, and what it may not."""

from __future__ import annotations

import numpy as np
import pytest

from lora_jax import errors
from lora_jax.models import config as config_lib
from lora_jax.models import hf
from lora_jax.models import registry
from lora_jax.models import rope
from tests.models import tiny

LLAMA = dict(
    model_type="llama", vocab_size=10, hidden_size=32, intermediate_size=64,
    num_hidden_layers=3, num_attention_heads=4)


def test_defaults_of_absent_keys_are_those_of_transformers():
  llama = registry.from_hf(LLAMA)
  assert (llama.n_kv_heads, llama.head_dim, llama.norm_eps) == (4, 8, 1e-6)
  assert (llama.bos_ids, llama.eos_ids, llama.max_position) == (
      (1,), (2,), 2048)
  assert not llama.tie_embeddings and llama.rope.theta == 10000.0
  mistral = registry.from_hf(dict(
      LLAMA, model_type="mistral", num_attention_heads=16))
  assert (mistral.n_kv_heads, mistral.sliding_window) == (8, 4096)
  assert registry.from_hf(dict(
      LLAMA, model_type="mistral", num_attention_heads=16,
      sliding_window=None)).windows() is None
  qwen3 = registry.from_hf(dict(
      LLAMA, model_type="qwen3", num_key_value_heads=None))
  assert (qwen3.n_kv_heads, qwen3.head_dim, qwen3.bos_ids) == (4, 128, ())
  listed = registry.from_hf(dict(LLAMA, eos_token_id=[5, 6]))
  assert listed.eos_ids == (5, 6)
  assert hash(listed) != hash(llama)


def test_old_and_new_rope_keys_say_the_same():
  scaling = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                 original_max_position_embeddings=64)
  old = dict(LLAMA, rope_theta=500.0,
             rope_scaling=dict(scaling, type="llama3"))
  new = dict(LLAMA, rope_parameters=dict(
      scaling, rope_type="llama3", rope_theta=500.0))
  assert registry.from_hf(old) == registry.from_hf(new)
  assert registry.from_hf(new).rope == config_lib.RopeConfig(
      type="llama3", theta=500.0, factor=8.0, original_max_position=64)


def test_windows_by_layer():
  qwen = dict(LLAMA, model_type="qwen2", num_key_value_heads=2,
              use_sliding_window=True, sliding_window=7, max_window_layers=2)
  assert registry.from_hf(qwen).windows() == (2**30, 2**30, 7)
  assert registry.from_hf(
      dict(qwen, use_sliding_window=False)).windows() is None
  assert registry.from_hf(
      dict(qwen, max_window_layers=3)).windows() is None


@pytest.mark.parametrize("change, parts", [
    (dict(hidden_act="relu"), ['hidden_act="relu"', "silu", "gelu"]),
    (dict(model_type="gemma"), ['"gemma"', "llama, mistral, qwen2, qwen3"]),
    (dict(model_type=None), ["None", "llama"]),
    (dict(rope_scaling=dict(type="dynamic", factor=2.0)),
     ['"dynamic"', "default, linear, llama3, yarn, longrope"]),
    (dict(rope_parameters=dict(full_attention=dict(rope_theta=1.0))),
     ["full_attention", "all layers"]),
    (dict(rope_scaling=dict(type="linear")), ["factor is missing"]),
    (dict(rope_scaling=dict(type="linear", factor="x")), ["factor is 'x'"]),
    (dict(partial_rotary_factor=0.4),
     ["partial_rotary_factor=0.4", "3 of head_dim=8", "even"]),
    (dict(partial_rotary_factor=1.5), ["rotates 12 of head_dim=8"]),
    (dict(model_type="phi3", rope_scaling=dict(
        type="su", short_factor=[1.0] * 3, long_factor=[1.0] * 4)),
     ["short_factor holds 3 values", "4 positive numbers"]),
    (dict(model_type="phi3", rope_scaling=dict(
        type="longrope", short_factor=[1.0] * 4)),
     ["long_factor holds None"]),
    (dict(model_type="gemma2", use_bidirectional_attention=True),
     ["use_bidirectional_attention", "causal"]),
    (dict(model_type="gemma2", num_key_value_heads=2,
          layer_types=["full_attention"]), ["1 values", "3 values"]),
    (dict(model_type="gemma2", query_pre_attn_scalar="x"),
     ["query_pre_attn_scalar is 'x'"]),
    (dict(model_type="gemma3_text", num_key_value_heads=2,
          rope_parameters=dict(rope_theta=1.0)),
     ['"rope_theta"', "full_attention, sliding_attention"]),
    (dict(model_type="gemma3"), ["text_config is missing"]),
    (dict(num_hidden_layers=None), ["num_hidden_layers is missing"]),
    (dict(vocab_size="ten"), ["vocab_size is 'ten'", "positive integer"]),
    (dict(num_key_value_heads=3), ["=3", "does not divide"]),
    (dict(head_dim=7), ["head_dim=7"]),
    (dict(model_type="qwen3", num_key_value_heads=2,
          layer_types=["full_attention", "chunked_attention", "x"]),
     ["chunked_attention", "full_attention, sliding_attention"]),
    (dict(model_type="qwen3", num_key_value_heads=2,
          layer_types=["full_attention"]), ["1 values", "3 values"]),
    (dict(model_type="qwen3", num_key_value_heads=2,
          layer_types=["sliding_attention"] * 3), ["use_sliding_window"]),
])
def test_unsupported_values(change, parts):
  with pytest.raises(errors.UserError) as caught:
    registry.from_hf({**LLAMA, **change}, "folder/config.json")
  message = str(caught.value)
  assert message.startswith("folder/config.json") and "\n" not in message
  for part in parts:
    assert part in message


def test_names_of_tensors():
  assert hf.hf_name(3, "q_proj") == "model.layers.3.self_attn.q_proj.weight"
  assert hf.hf_name(0, "up_proj", "bias") == "model.layers.0.mlp.up_proj.bias"
  assert hf.hf_name(None, "lm_head", "") == "lm_head"
  names = hf.names(tiny.CONFIGS["qwen3"])
  assert names["model.layers.1.self_attn.k_norm.weight"] == (8,)
  assert names["model.layers.1.self_attn.k_proj.weight"] == (16, 24)
  assert names["model.layers.0.mlp.down_proj.weight"] == (24, 40)
  assert "lm_head.weight" not in hf.names(tiny.CONFIGS["qwen2"])
  assert "model.layers.0.self_attn.q_proj.bias" in hf.names(
      tiny.CONFIGS["qwen2"])


@pytest.mark.parametrize("config", [
    config_lib.RopeConfig(theta=1e4),
    config_lib.RopeConfig("linear", 1e4, factor=4.0),
    config_lib.RopeConfig("llama3", 5e5, 32.0, 8192),
    config_lib.RopeConfig("yarn", 1e6, 4.0, 32768),
    config_lib.RopeConfig("yarn", 1e4, 40.0, 4096, mscale=0.7,
                          mscale_all_dim=1.0, truncate=False),
    config_lib.RopeConfig(
        "longrope", 1e4, 32.0, 4096,
        short_factor=tuple(1 + i / 64 for i in range(64)),
        long_factor=tuple(1 + i for i in range(64))),
], ids=lambda c: c.type)
def test_frequencies_equal_transformers(config):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  from transformers import modeling_rope_utils

  theirs = transformers.LlamaConfig(
      hidden_size=512, num_attention_heads=4, num_hidden_layers=1,
      max_position_embeddings=131072, rope_parameters=config.to_hf())
  if config.type == "default":
    steps = torch.arange(0, 128, 2, dtype=torch.float)
    inverse, scale = 1.0 / (config.theta ** (steps / 128)), 1.0
  else:
    inverse, scale = modeling_rope_utils.ROPE_INIT_FUNCTIONS[config.type](
        theirs)
  ours, our_scale = rope.ROPES[config.type](config, 128)
  # One unit in the last place or two: numpy's and torch's powers differ.
  np.testing.assert_allclose(ours, inverse.numpy(), rtol=2.5e-7)
  assert ours.dtype == np.float32
  assert our_scale == pytest.approx(scale, rel=1e-12)


def test_rotation_by_hand():
  config = config_lib.RopeConfig(theta=100.0)
  cos, sin = rope.tables(config, 4, np.array([[0, 3]]))
  x = np.arange(1.0, 5.0, dtype=np.float32).reshape(1, 1, 1, 4).repeat(2, 1)
  out = np.asarray(rope.rotate(x, cos, sin))
  np.testing.assert_array_equal(out[0, 0, 0], [1, 2, 3, 4])
  c, s = np.cos([3, 0.3]), np.sin([3, 0.3])
  expected = [1 * c[0] - 3 * s[0], 2 * c[1] - 4 * s[1],
              3 * c[0] + 1 * s[0], 4 * c[1] + 2 * s[1]]
  np.testing.assert_allclose(out[0, 1, 0], expected, rtol=1e-6)
