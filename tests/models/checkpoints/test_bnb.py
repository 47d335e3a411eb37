"""Folders that transformers and bitsandbytes wrote, against both."""

from __future__ import annotations

import copy
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from lora_jax import errors
from lora_jax import quant
from lora_jax.export import hf as hf_export
from lora_jax.models import hf
from lora_jax.models import load
from lora_jax.quant import bnb
from tests import tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
functional = pytest.importorskip("bitsandbytes.functional")

TOKENS = np.random.default_rng(0).integers(0, 61, (1, 12)).astype(np.int32)
SHAPE = dict(
    vocab_size=61, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
    tie_word_embeddings=False)
NF4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4",
           bnb_4bit_use_double_quant=True)
# Options of BitsAndBytesConfig, and the type of the checkpoint. 96 inputs of
# down_proj are no multiple of 64: blocks cross rows.
CASES = {
    "nf4 nested, bfloat16 storage": (
        NF4 | {"bnb_4bit_quant_storage": "bfloat16"}, "float32"),
    "nf4 nested, float32 storage, bfloat16": (
        NF4 | {"bnb_4bit_quant_storage": "float32"}, "bfloat16"),
    "nf4, skipped modules, blocks cross rows": (
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
         "llm_int8_skip_modules": ["lm_head", "layers.1.self_attn.q_proj"]},
        "float32"),
    "fp4, head too, float16": (
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4",
         "llm_int8_skip_modules": ["none"]}, "float16"),
    "int8": ({"load_in_8bit": True}, "float32"),
}
ONE_OF_EACH = pytest.mark.parametrize(
    "case", ["nf4 nested, bfloat16 storage", "int8"], indirect=True)
KINDS = {"nf4": quant.FORMATS["nf4"], "fp4": quant.FORMATS["fp4"],
         "int": quant.FORMATS["llm_int8"]}


def shape(name):
  return SHAPE | ({"intermediate_size": 96} if "cross rows" in name else {})


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
  """(name, folder, type, the model in transformers, weights by module)."""
  options, dtype = CASES[request.param]
  floats = tmp_path_factory.mktemp("floats")
  torch.manual_seed(0)
  transformers.LlamaForCausalLM(
      transformers.LlamaConfig(**shape(request.param))).save_pretrained(floats)
  model = transformers.AutoModelForCausalLM.from_pretrained(
      floats, dtype=getattr(torch, dtype),
      quantization_config=transformers.BitsAndBytesConfig(**options))
  folder = tmp_path_factory.mktemp("quantised")
  model.save_pretrained(folder)
  weights = {
      name: dense(module) for name, module in model.named_modules()
      if isinstance(module, torch.nn.Linear)}
  return request.param, folder, dtype, model, weights


def dense(module):
  """float32 `[i, o]`, by bitsandbytes."""
  weight = module.weight.detach()
  if hasattr(module.weight, "quant_state"):
    state = copy.copy(module.weight.quant_state)
    rows, state.shape = state.shape[0], (state.shape.numel(),)
    # Flat: the CPU kernel of 0.50.2 starts a block anew in every row, though
    # its encoder and the CUDA kernels do not.
    weight = functional.dequantize_4bit(
        weight, state).reshape(rows, -1)
  elif weight.dtype == torch.int8:
    weight = functional.int8_vectorwise_dequant(weight, module.weight.SCB)
  return weight.float().numpy().T


def ours(loaded):
  positions = np.arange(12, dtype=np.int32)[None]
  return tiny.logits(
      loaded.config, loaded.base, TOKENS, positions, np.ones_like(positions))


def holders(loaded):
  """Weight `[i, o]` of every projection, by module."""
  found = {"lm_head": loaded.base.lm_head.weight}
  for target, paths in tiny.paths(loaded.config).items():
    for layer, path in enumerate(paths if target in tiny.TARGETS else ()):
      found[path] = jax.tree.map(
          lambda x: x[layer],  # noqa: B023
          loaded.base.layers[target].weight)
  return found


def test_weights_equal_bitsandbytes_bit_for_bit(case):
  name, folder, dtype, _, weights = case
  # The default of every config, which must not quantise again.
  loaded = load.load(folder, quant.QuantSpec(), dtype=dtype)
  found = holders(loaded)
  assert found.keys() == weights.keys()

  @jax.jit
  def scanned(base):
    def body(carry, layer):
      return carry, {
          target: quant.dequantize(layer[target].weight, dtype)
          for target in tiny.TARGETS}

    return jax.lax.scan(body, 0, base.layers)[1]

  values = scanned(loaded.base)
  for module, expected in weights.items():
    value = quant.dequantize(found[module], dtype)
    np.testing.assert_array_equal(np.asarray(value, np.float32), expected)
    if module != "lm_head":
      layer, target = module.split(".")[2], module.split(".")[-1]
      np.testing.assert_array_equal(
          np.asarray(values[target][int(layer)], np.float32), expected)
  kind = KINDS[name[:3]]
  floats = {"down_proj"} if "cross rows" in name else set()
  if "skipped" in name:
    floats.add("q_proj")  # Skipped in one layer, so in the whole stack.
  for target in tiny.TARGETS:
    weight = loaded.base.layers[target].weight
    assert type(weight) is kind if target not in floats else (
        isinstance(weight, jax.Array) and weight.dtype == dtype), target
  assert isinstance(loaded.base.lm_head.weight, quant.QuantizedArray) == (
      "head too" in name)


@pytest.mark.parametrize("case", [
    name for name, (_, dtype) in CASES.items() if dtype == "float32"],
                         indirect=True)
def test_logits_equal_the_dequantised_model(case):
  name, folder, _, model, weights = case
  loaded = load.load(folder)
  plain = transformers.LlamaForCausalLM(
      transformers.LlamaConfig(**shape(name)))
  state = {k: v for k, v in model.state_dict().items()
           if k in plain.state_dict()}
  state |= {f"{module}.weight": torch.from_numpy(np.ascontiguousarray(w.T))
            for module, w in weights.items()}
  plain.load_state_dict(state)
  expected = tiny.torch_logits(plain.eval(), TOKENS)
  assert tiny.distance(ours(loaded), expected) < 2e-5
  if name == "int8" or "cross rows" in name:
    return
  # bitsandbytes' own 4-bit forward, which goes by way of bfloat16 (4e-3).
  theirs = tiny.torch_logits(model, TOKENS)
  assert tiny.distance(ours(loaded), theirs) < 2e-2


@ONE_OF_EACH
def test_none_dequantises_and_the_fingerprint_covers_every_tensor(
    case, tmp_path):
  _, folder, dtype, _, weights = case
  loaded = load.load(folder, quant.QuantSpec(format="none"), dtype=dtype)
  for module, weight in holders(loaded).items():
    assert isinstance(weight, jax.Array)
    np.testing.assert_array_equal(
        np.asarray(weight, np.float32), weights[module])
  assert loaded.fingerprint == load.load(folder).fingerprint
  tensors = safetensors.numpy.load_file(folder / "model.safetensors")
  (tmp_path / "config.json").write_bytes(
      (folder / "config.json").read_bytes())
  name = "model.layers.1.self_attn.v_proj."
  for key in ("weight.absmax", "SCB", "weight"):
    if name + key in tensors:
      changed = dict(tensors)
      changed[name + key] = np.flip(tensors[name + key], 0).copy()
      safetensors.numpy.save_file(changed, tmp_path / "model.safetensors")
      assert load.load(tmp_path).fingerprint != loaded.fingerprint


@ONE_OF_EACH
def test_the_merged_export_has_these_weights(case, tmp_path):
  _, folder, dtype, _, weights = case
  loaded = load.load(folder, dtype=dtype)
  hf_export.write(tmp_path / "out", loaded.config, loaded.base, dtype=dtype)
  written = load.load(tmp_path / "out", dtype=dtype)
  assert "quantization_config" not in json.loads(
      (tmp_path / "out" / "config.json").read_text())
  for module, weight in holders(written).items():
    np.testing.assert_array_equal(
        np.asarray(weight, np.float32), weights[module])


def _fails(folder, *parts):
  with pytest.raises(errors.UserError) as caught:
    load.load(folder)
  assert "\n" not in str(caught.value)
  for part in parts:
    assert part in str(caught.value), str(caught.value)


def test_errors(tmp_path):
  config = tiny.CONFIGS["mistral"]
  name = "model.layers.0.self_attn.k_proj."
  tensors = {n: np.ones(shape, np.float32)
             for n, shape in hf.names(config).items()}

  def write(method, **changes):
    (tmp_path / "config.json").write_text(
        json.dumps(config.to_hf() | {"quantization_config": method}))
    safetensors.numpy.save_file(
        tensors | {name + k: v for k, v in changes.items()},
        tmp_path / "model.safetensors")

  write({"quant_method": "aqlm"})
  _fails(tmp_path, "config.json", '"aqlm"', "bitsandbytes, gptq, awq",
         "quant.format")
  write({"quant_method": "bitsandbytes"})
  _fails(tmp_path, "load_in_4bit nor")
  write({"load_in_8bit": True}, SCB=np.ones(16, np.float32))
  _fails(tmp_path, name + "weight", "float32 [16, 24]")
  int8 = np.ones((16, 24), np.int8)
  write({"load_in_8bit": True}, SCB=np.ones(15, np.float32), weight=int8)
  _fails(tmp_path, "SCB [15]")
  write({"load_in_8bit": True}, SCB=np.ones(8, np.float32), weight=int8[:8])
  _fails(tmp_path, "[8, 24]", "[16, 24]")
  state = "weight.quant_state.bitsandbytes__nf4"
  write({"load_in_4bit": True},
        **{state: np.frombuffer(b"{}", np.uint8).copy()})
  _fails(tmp_path, name, '"weight.quant_map" is missing')


@ONE_OF_EACH
def test_kept_codes_are_bitsandbytes_own(case):
  """No second quantisation: the codes are those in the file."""
  name, folder, *_ = case
  tensors = safetensors.numpy.load_file(folder / "model.safetensors")
  module = "model.layers.1.mlp.up_proj."
  weight = holders(load.load(folder, quant.QuantSpec("int4")))[module[:-1]]
  if name == "int8":
    np.testing.assert_array_equal(weight.codes, tensors[module + "weight"].T)
  else:
    np.testing.assert_array_equal(
        bnb.to_bnb(weight)["weight"].reshape(-1),
        tensors[module + "weight"].reshape(-1).view(np.uint8))
