"""GGUF files against the Hugging Face folders they were made from."""

from __future__ import annotations

import dataclasses
import functools

import gguf
import jax
import numpy as np
import pytest

from lora_jax import errors
from lora_jax.models import config as config_lib
from lora_jax.models import gguf as gguf_lib
from lora_jax.models import hf
from lora_jax.models import init
from lora_jax.models import load
from lora_jax.models.families import in_gguf
from tests.models import tiny

_LLAMA = dataclasses.replace(
    tiny.CONFIGS["llama"], qkv_bias=True, o_bias=True,
    rope=config_lib.RopeConfig(type="linear", theta=500.0, factor=2.0),
    norm_eps=0.5, bos_ids=(3,), eos_ids=(4,))
CONFIGS = {
    "llama": _LLAMA,
    "qwen2": dataclasses.replace(
        tiny.CONFIGS["qwen2"], rope=config_lib.RopeConfig(
            type="yarn", factor=4.0, original_max_position=16)),
    "qwen3": dataclasses.replace(
        tiny.CONFIGS["qwen3"], sliding_window=None, window_layers=None),
    "gemma2": dataclasses.replace(
        tiny.CONFIGS["gemma2"], query_pre_attn_scalar=8),
    "gemma3": dataclasses.replace(
        tiny.CONFIGS["gemma3_text"], query_pre_attn_scalar=8,
        window_layers=(True, True), local_rope=config_lib.RopeConfig()),
    "phi3": tiny.CONFIGS["phi3"],
}


def permute(rows, n_heads):
  """llama.cpp's `convert_hf_to_gguf.py`, `LlamaModel.permute`."""
  return (rows.reshape(n_heads, 2, rows.shape[0] // n_heads // 2,
                       *rows.shape[1:])
          .swapaxes(1, 2).reshape(rows.shape))


def write(path, config, base, skip=(), more=()):
  """A GGUF file as llama.cpp's converter writes it."""
  arch = config.family.removesuffix("_text")
  writer = gguf.GGUFWriter(path, arch)
  writer.add_block_count(config.n_layers)
  writer.add_context_length(config.max_position)
  writer.add_embedding_length(config.d_model)
  writer.add_feed_forward_length(config.d_ff)
  writer.add_head_count(config.n_heads)
  writer.add_head_count_kv(config.n_kv_heads)
  writer.add_key_length(config.head_dim)
  writer.add_layer_norm_rms_eps(config.norm_eps)
  writer.add_rope_freq_base(config.rope.theta)
  if config.rope.type == "longrope":
    rope = config.rope
    writer.add_rope_dimension_count(rope.rotary_dim(config.head_dim))
    writer.add_rope_scaling_orig_ctx_len(rope.original_max_position)
    writer.add_tensor(
        "rope_factors_long.weight", np.float32(rope.long_factor))
    writer.add_tensor(
        "rope_factors_short.weight", np.float32(rope.short_factor))
  elif config.rope.type != "default":
    writer.add_rope_scaling_type(gguf.RopeScalingType(config.rope.type))
    writer.add_rope_scaling_factor(config.rope.factor)
    if config.rope.original_max_position:
      writer.add_rope_scaling_orig_ctx_len(config.rope.original_max_position)
  if config.sliding_window:
    writer.add_sliding_window(config.sliding_window)
  if config.attn_softcap:
    writer.add_attn_logit_softcapping(config.attn_softcap)
    writer.add_final_logit_softcapping(config.final_softcap)
  for ids, add in ((config.bos_ids, writer.add_bos_token_id),
                   (config.eos_ids, writer.add_eos_token_id)):
    for i in ids:
      add(i)
  names = gguf.get_tensor_name_map(
      gguf.MODEL_ARCH[arch.upper()], config.n_layers)
  for name, value in hf.state(config, base, "float32"):
    module, leaf = name.rsplit(".", 1)
    if name in skip:
      continue
    if arch == "llama" and module.endswith("q_proj"):
      value = permute(value, config.n_heads)
    if arch == "llama" and module.endswith("k_proj"):
      value = permute(value, config.n_kv_heads)
    if arch.startswith("gemma") and name.endswith("norm.weight"):
      value = value + np.float32(1)
    writer.add_tensor(f"{names.get_name(module)}.{leaf}", value)
  for name in more:
    writer.add_tensor(name, np.ones(4, np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


@pytest.mark.parametrize("family", CONFIGS)
def test_round_trip(tmp_path, family):
  config = CONFIGS[family]
  base = init.random_base(jax.random.key(3), config)
  write(tmp_path / "model.gguf", config, base)
  loaded = load.load(tmp_path)  # The folder's only GGUF file.
  eps = loaded.config.norm_eps  # Stored as float32.
  assert eps == np.float32(config.norm_eps)
  assert dataclasses.replace(loaded.config, norm_eps=config.norm_eps) == config
  # 1 added to Gemma's norms and taken off again rounds them.
  near = functools.partial(np.testing.assert_allclose, rtol=0, atol=(
      2.4e-7 if config.norm_offset else 0))
  jax.tree.map(near, loaded.base, base)


def test_unpermute_undoes_llama_cpp():
  rows = np.arange(48).reshape(24, 2)
  there = permute(rows, 3)
  assert (there != rows).any()
  np.testing.assert_array_equal(gguf_lib.unpermute(there, 3), rows)


def test_errors(tmp_path):
  config = CONFIGS["qwen3"]
  base = init.random_base(jax.random.key(3), config)
  path = tmp_path / "a.gguf"

  def fails(*parts, place=path):
    with pytest.raises(errors.UserError) as caught:
      load.load(place)
    assert "\n" not in str(caught.value)
    for part in parts:
      assert part in str(caught.value)

  missing = hf.hf_name(1, "k_norm")
  write(path, config, base, skip=(missing,))
  fails(str(path), missing, "missing")
  write(path, config, base, more=("rope_freqs.weight",))
  fails("rope_freqs", "safetensors")
  write(path, config, base, more=("blk.0.odd",))
  fails("blk.0.odd")
  write(path, config, base)
  whole = path.read_bytes()
  for cut in (len(whole) - 50, 200, 3):
    path.write_bytes(whole[:cut])
    fails(str(path), "cut short", "download")
  writer = gguf.GGUFWriter(path, "gemma")
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.close()
  fails('"gemma"', "llama, mistral, qwen2, qwen3")
  path.write_bytes(whole)
  (tmp_path / "b.gguf").write_bytes(whole)
  fails("2 GGUF files", "a.gguf", place=tmp_path)


def test_config_of_smollm2(smollm2_path):
  config = load.open_source(smollm2_path).config
  assert (config.n_layers, config.d_model, config.d_ff) == (30, 576, 1536)
  assert (config.n_heads, config.n_kv_heads, config.head_dim) == (9, 3, 64)
  assert config.tie_embeddings and config.vocab_size == 49152
  assert (config.rope.theta, config.max_position) == (100000.0, 8192)
  assert (config.bos_ids, config.eos_ids) == ((1,), (2,))


@pytest.mark.parametrize("arch, n_layers, scalar", [
    ("gemma2", 42, 256), ("gemma2", 46, 144), ("gemma3", 48, 256),
    ("gemma3", 62, 168)])
def test_scale_of_gemma_is_by_its_size(arch, n_layers, scalar):
  """Google's own configs say these; llama.cpp's files say nothing."""
  d, h = (4608, 32) if arch == "gemma2" else (5376, 32)
  found = in_gguf.config(arch, {
      f"{arch}.embedding_length": d, f"{arch}.attention.head_count": h,
      f"{arch}.attention.key_length": 256, f"{arch}.block_count": n_layers},
      {})
  assert found["query_pre_attn_scalar"] == scalar
