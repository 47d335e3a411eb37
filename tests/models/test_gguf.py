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


def write(path, config, base, skip=(), more=(), kinds=None, arch=None,
          **options):
  """A GGUF file as llama.cpp's converter writes it.

  Args:
    path: of the file.
    config: the model.
    base: its weights.
    skip: names left out.
    more: names of ones, or pairs with their values, added.
    kinds: (name, value) -> raw tensor, its type; None is float32.
    arch: what the architecture is called.
    **options: of the writer.
  """
  arch = arch or config.family.removesuffix("_text")
  writer = gguf.GGUFWriter(path, arch, **options)
  writer.add_vocab_size(config.vocab_size)
  writer.add_block_count(config.n_layers)
  writer.add_context_length(config.max_position)
  writer.add_embedding_length(config.d_model)
  writer.add_feed_forward_length(config.d_ff)
  writer.add_head_count(config.n_heads)
  writer.add_head_count_kv(config.n_kv_heads)
  writer.add_key_length(config.head_dim)
  writer.add_layer_norm_rms_eps(config.norm_eps)
  writer.add_rope_freq_base(config.rope.theta)
  if config.sliding_window:
    writer.add_sliding_window(config.sliding_window)
  if config.rope.type == "longrope":
    rope = config.rope
    writer.add_rope_dimension_count(rope.rotary_dim(config.head_dim))
    writer.add_rope_scaling_orig_ctx_len(rope.original_max_position)
    writer.add_tensor(
        "rope_factors_long.weight", np.float32(rope.long_factor))
    writer.add_tensor(
        "rope_factors_short.weight", np.float32(rope.short_factor))
  elif config.rope.type not in ("default", "llama3"):
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
    raw, kind = kinds(name, value) if kinds else (value, None)
    writer.add_tensor(f"{names.get_name(module)}.{leaf}", raw, raw_dtype=kind)
  for name in more:
    name, value = (name, np.ones(4)) if isinstance(name, str) else name
    writer.add_tensor(name, np.float32(value))
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


# Which the package writes; of the others it reads random blocks.
ENCODED = ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0",
           "TQ2_0", "MXFP4")
RANDOM = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ2_XXS", "IQ2_XS", "IQ2_S",
          "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M", "IQ4_NL", "IQ4_XS")
# Relative to the largest value of a tensor, or of 32 of them.
STEPS = {"F16": 2**-11, "BF16": 2**-8, "Q4_0": 1 / 8, "Q4_1": 1 / 15,
         "Q5_0": 1 / 16, "Q5_1": 1 / 31, "Q8_0": 1 / 127, "TQ1_0": 1,
         "TQ2_0": 1, "MXFP4": 1 / 2}


def test_every_type_of_block(tmp_path):
  """Types as one file mixes them, each on a tensor of its own."""
  config = dataclasses.replace(
      CONFIGS["qwen3"], vocab_size=8, d_model=256, d_ff=256, n_heads=4,
      n_kv_heads=4, head_dim=64, n_layers=4)
  base = init.random_base(jax.random.key(3), config)
  left, held = [*ENCODED, *RANDOM], {}
  rng = np.random.default_rng(0)

  def kinds(name, value):
    if "_proj" not in name or not left:
      return value, None
    kind = gguf.GGMLQuantizationType[left.pop()]
    if kind.name in RANDOM:
      block, size = gguf.GGML_QUANT_SIZES[kind]
      raw = rng.integers(
          0, 256, (256, 256 // block * size)).astype(np.uint8)
    else:
      raw = gguf.quantize(value, kind)
    held[name] = kind, raw, value
    return raw, kind

  write(tmp_path / "a.gguf", config, base, kinds=kinds)
  source = load.open_source(tmp_path)
  assert not left and len(held) == len(ENCODED + RANDOM)
  for name, (kind, raw, value) in held.items():
    read = source.read(name)
    assert read.dtype == kind.name and read.array.shape == (256, 256)
    np.testing.assert_array_equal(read.array, gguf.dequantize(raw, kind))
    np.testing.assert_array_equal(read.raw, raw.reshape(-1).view(np.uint8))
    if kind.name in STEPS:
      error = np.abs(read.array - value).max() / np.abs(value).max()
      assert 0 < error <= STEPS[kind.name], kind.name


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_transformers_reads_the_same_weights(tmp_path, family):
  pytest.importorskip("torch")
  import transformers

  config = dataclasses.replace(
      CONFIGS[family], rope=config_lib.RopeConfig(), qkv_bias=family == "qwen2",
      o_bias=False, mlp_bias=False, d_model=32, d_ff=64)
  base = init.random_base(jax.random.key(3), config)
  q8 = gguf.GGMLQuantizationType.Q8_0

  def kinds(name, value):
    return (gguf.quantize(value, q8), q8) if "_proj.w" in name else (
        value, None)

  write(tmp_path / "a.gguf", config, base, kinds=kinds)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(
      tmp_path, gguf_file="a.gguf", dtype="float32").state_dict()
  ours = dict(hf.state(config, load.load(tmp_path).base, "float32"))
  assert ours.keys() - theirs.keys() == set()
  for name, value in ours.items():
    np.testing.assert_array_equal(value, theirs[name].numpy(), name)


def llama3_factors(rope, head_dim):
  """llama.cpp's `convert_hf_to_gguf.py`, `generate_extra_tensors`."""
  freqs = 1.0 / (rope.theta ** (np.arange(0, head_dim, 2) / head_dim))
  low = rope.original_max_position / rope.low_freq_factor
  high = rope.original_max_position / rope.high_freq_factor
  factors = []
  for freq in freqs:
    wavelength = 2 * np.pi / freq
    if wavelength < high:
      factors.append(1)
    elif wavelength > low:
      factors.append(rope.factor)
    else:
      smooth = (rope.original_max_position / wavelength
                - rope.low_freq_factor) / (
                    rope.high_freq_factor - rope.low_freq_factor)
      factors.append(1 / ((1 - smooth) / rope.factor + smooth))
  return np.float32(factors)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recovered(tmp_path, factor):
  config = dataclasses.replace(
      tiny.CONFIGS["llama"], head_dim=64, mlp_bias=False,
      rope=config_lib.RopeConfig(
          type="llama3", theta=500000.0, factor=factor,
          original_max_position=8192))
  factors = llama3_factors(config.rope, 64)
  assert ((factors > 1) & (factors < factor)).sum() >= 3  # The band is there.
  base = init.random_base(jax.random.key(3), config)
  write(tmp_path / "a.gguf", config, base,
        more=[("rope_freqs.weight", factors)])
  assert load.load(tmp_path).config.rope == config.rope
  write(tmp_path / "a.gguf", config, base, more=[(
      "rope_freqs.weight", np.ones(32))])
  assert load.load(tmp_path).config.rope == config_lib.RopeConfig(
      theta=500000.0)


def test_other_divisors_are_kept_one_by_one():
  pytest.importorskip("torch")
  import transformers

  factors = llama3_factors(config_lib.RopeConfig(
      theta=500000.0, factor=8.0, original_max_position=4096), 64)
  scaling = gguf_lib.rope_scaling(
      factors, {"rope_theta": 500000.0, "max_position_embeddings": 131072})
  config = transformers.LlamaConfig(
      head_dim=64, hidden_size=64, num_attention_heads=1,
      max_position_embeddings=131072,
      rope_parameters=scaling | {"rope_theta": 500000.0})
  from transformers import modeling_rope_utils

  for length in (10, 100000):
    theirs, scale = modeling_rope_utils.ROPE_INIT_FUNCTIONS["longrope"](
        config, "cpu", seq_len=length)
    expected = 500000.0 ** (-np.arange(0, 64, 2) / 64) / factors
    np.testing.assert_allclose(theirs.numpy(), expected, rtol=2e-6)
    assert scale == 1.0


def test_mistral_is_a_llama_with_a_window(tmp_path):
  config = tiny.CONFIGS["mistral"]
  base = init.random_base(jax.random.key(3), config)
  write(tmp_path / "a.gguf", config, base, arch="llama")
  loaded = load.load(tmp_path)
  assert loaded.config.family == "mistral"
  assert loaded.config.windows() == config.windows()
  jax.tree.map(np.testing.assert_array_equal, loaded.base, base)


def test_parts_are_one_model(tmp_path):
  config = CONFIGS["qwen3"]
  base = init.random_base(jax.random.key(3), config)
  write(tmp_path / "a.gguf", config, base, split_max_tensors=9)
  files = sorted(tmp_path.iterdir())
  assert len(files) == 3 and files[0].name == "a-00001-of-00003.gguf"
  for place in (tmp_path, files[0], files[2]):
    loaded = load.load(place)
    jax.tree.map(np.testing.assert_array_equal, loaded.base, base)
  files[1].rename(tmp_path / "other")
  with pytest.raises(errors.UserError, match=r"a-00002-of-00003\.gguf is miss"):
    load.load(files[0])
  files[0].rename(tmp_path / "b.gguf")
  with pytest.raises(errors.UserError, match="one of 3 files"):
    load.load(tmp_path / "b.gguf")


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
  split = tmp_path / "c-00002-of-00002.gguf"
  write(split, config, base)
  fails("c-00001-of-00002.gguf", "is missing", place=split)
  split.unlink()
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
