"""Adapter folders against Hugging Face PEFT, both ways, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax import trees
from lora_jax.export import peft as peft_export
from lora_jax.models import hf
from lora_jax.models import init
from tests import tiny

TOKENS = np.random.default_rng(0).integers(0, 61, (2, 24)).astype(np.int32)
POSITIONS = np.broadcast_to(np.arange(24, dtype=np.int32), (2, 24))
ONES = np.ones((2, 24), np.int32)

LORA = adapters_lib.AdapterConfig(rank=3, alpha=6.0)
PATTERNS = dict(
    rank_pattern={"q_proj": 2, r"layers\.1\.mlp\..*": 5},
    alpha_pattern={r"self_attn\.v_proj": 1.0, "down_proj": 20.0})
# family, our adapter block, the same for PEFT's LoraConfig.
CASES = {
    "lora": ("llama", LORA, {}),
    "lora with dropout": (
        "llama", dataclasses.replace(LORA, dropout=0.5),
        dict(lora_dropout=0.5)),
    "rslora": ("llama", dataclasses.replace(LORA, method="rslora"),
               dict(use_rslora=True)),
    "dora": ("llama", dataclasses.replace(LORA, method="dora"),
             dict(use_dora=True)),
    "patterns": ("qwen3", dataclasses.replace(LORA, **PATTERNS), PATTERNS),
    "dora, patterns, one layer": (
        "qwen3", dataclasses.replace(
            LORA, method="dora", layers="1", **PATTERNS),
        dict(use_dora=True, layers_to_transform=[1],
             target_modules=list(tiny.TARGETS), **PATTERNS)),
    "embeddings": (
        "mistral", dataclasses.replace(
            LORA, targets=("embed_tokens", "lm_head", "q_proj")),
        dict(target_modules=["embed_tokens", "lm_head", "q_proj"])),
    "dora, tied embeddings": (
        "qwen2", dataclasses.replace(
            LORA, method="dora", targets=("embed_tokens", "v_proj")),
        dict(use_dora=True, target_modules=["embed_tokens", "v_proj"])),
    "scaled embeddings": (
        "gemma2", dataclasses.replace(
            LORA, targets=("embed_tokens", "v_proj")),
        dict(target_modules=["embed_tokens", "v_proj"])),
    "fused": ("phi3", LORA, {}),
    "fused dora": ("phi3", dataclasses.replace(LORA, method="dora"),
                   dict(use_dora=True)),
    "fused rslora, patterns": (
        "phi3", dataclasses.replace(
            LORA, method="rslora", alpha=1.0,
            rank_pattern={"[qkv]_proj": 4, r"layers\.1\.mlp\..*": 5},
            alpha_pattern={"down_proj": 2.0, "[qkv]_proj": 3.0}),
        dict(use_rslora=True, lora_alpha=1,
             rank_pattern={"qkv_proj": 4, r"layers\.1\.mlp\..*": 5},
             alpha_pattern={"down_proj": 2.0, "qkv_proj": 3.0})),
}


def _model(family):
  config = tiny.CONFIGS[family]
  return config, init.random_base(jax.random.key(1), config)


def _paths(config):
  paths = tiny.paths(config)
  if config.tie_embeddings:
    del paths["lm_head"]
  return paths


def _logits(config, base, adapters):
  return tiny.logits(config, base, TOKENS, POSITIONS, ONES, adapters)


def _write(folder, config, adapters, block, **kwargs):
  paths = _paths(config)
  content = peft_export.peft_config(block, adapters, paths, "some/base")
  peft_export.write(folder, adapters, content, paths,
                    fused=hf.fused_modules(config), **kwargs)


def _read(folder, config):
  return peft_export.read(folder, _paths(config), tiny.shapes(config),
                          hf.fused_modules(config))


# test_interop.py has these methods; the others have fused modules, patterns.
LIKE_OTHERS = "lora", "dora", "patterns", "fused", "fused dora"


@pytest.mark.parametrize("case", [
    pytest.param(x, marks=pytest.mark.slow) if x in LIKE_OTHERS else x
    for x in CASES])
def test_peft_loads_ours(case, tmp_path):
  pytest.importorskip("torch")
  peft = pytest.importorskip("peft")

  family, block, _ = CASES[case]
  config, base = _model(family)
  adapters = tiny.random_adapters(config, base, block)
  folder = tmp_path / "adapter"
  _write(folder, config, adapters, block)
  model = peft.get_peft_model(
      tiny.to_torch(config, base, tmp_path / "base"),
      peft.LoraConfig.from_pretrained(folder))
  expected = {n for n in peft.get_peft_model_state_dict(
      model, save_embedding_layers=False)}
  saved = safetensors.numpy.load_file(folder / peft_export.WEIGHTS)
  assert saved.keys() == expected
  result = peft.set_peft_model_state_dict(
      model, peft.utils.load_peft_weights(str(folder), device="cpu"))
  assert not result.unexpected_keys
  assert not [k for k in result.missing_keys if "lora_" in k]
  ours = _logits(config, base, adapters)
  assert tiny.distance(ours, tiny.torch_logits(model.eval(), TOKENS)) <= 2e-5
  assert tiny.distance(ours, _logits(config, base, None)) > 1e-2


@pytest.mark.parametrize("case", CASES)
def test_ours_loads_peft(case, tmp_path):
  torch = pytest.importorskip("torch")
  peft = pytest.importorskip("peft")

  family, block, options = CASES[case]
  config, base = _model(family)
  torch.manual_seed(0)
  model = peft.get_peft_model(
      tiny.to_torch(config, base, tmp_path / "base"),
      peft.LoraConfig(**dict(
          r=3, lora_alpha=6, target_modules="all-linear",
          init_lora_weights=False, task_type="CAUSAL_LM") | options))
  with torch.no_grad():
    for name, value in model.named_parameters():
      if "lora_" in name:
        value += 0.2 * torch.randn_like(value)
  model.save_pretrained(tmp_path / "adapter")
  loaded = _read(tmp_path / "adapter", config)
  assert tiny.distance(
      _logits(config, base, loaded.adapters),
      tiny.torch_logits(model.eval(), TOKENS)) <= 2e-5
  assert loaded.config.method == block.method
  assert loaded.config.dropout == block.dropout
  assert loaded.fingerprint is None
  # As many parameters as PEFT trains.
  trainable, _ = adapters_lib.split(loaded.adapters)
  built = adapters_lib.build(
      jax.random.key(0), block, base, _paths(config))[1]

  def shapes(tree):
    return {k: v.shape for k, v in trees.paths(tree).items()}

  assert shapes(trainable) == shapes(adapters_lib.split(built)[0])


@pytest.mark.parametrize("case", CASES)
def test_save_load_save_is_byte_identical(case, tmp_path):
  family, block, _ = CASES[case]
  config, base = _model(family)
  adapters = tiny.random_adapters(config, base, block)
  _write(tmp_path / "a", config, adapters, block, fingerprint="abc")
  loaded = _read(tmp_path / "a", config)
  assert loaded.fingerprint == "abc"
  peft_export.write(tmp_path / "b", loaded.adapters, loaded.peft_config,
                    _paths(config), loaded.fingerprint,
                    hf.fused_modules(config))
  names = sorted(p.name for p in (tmp_path / "a").iterdir())
  assert names == [peft_export.CONFIG, peft_export.WEIGHTS]
  for name in names:
    assert ((tmp_path / "a" / name).read_bytes()
            == (tmp_path / "b" / name).read_bytes())
  ranks = lambda tree: {
      k: np.asarray(v) for k, v in trees.paths(tree).items()
      if k.endswith(("rank", "scale", "rate"))}
  found = ranks(loaded.adapters), ranks(adapters)
  assert found[0].keys() == found[1].keys()
  for name, value in found[0].items():
    np.testing.assert_array_equal(value, found[1][name])


def test_one_layer_is_a_stack_of_one(tmp_path):
  config = dataclasses.replace(tiny.CONFIGS["llama"], n_layers=1)
  base = init.random_base(jax.random.key(1), config)
  adapters = tiny.random_adapters(config, base, LORA)
  _write(tmp_path / "a", config, adapters, LORA)
  loaded = _read(tmp_path / "a", config).adapters
  assert not loaded.outer
  np.testing.assert_array_equal(
      _logits(config, base, loaded), _logits(config, base, adapters))


def test_peft_config_names_modules():
  config, base = _model("qwen3")
  paths = _paths(config)
  some = dataclasses.replace(LORA, targets="q_proj,mlp.up_proj", layers="1")
  adapters = tiny.random_adapters(config, base, some)
  found = peft_export.peft_config(some, adapters, paths)
  assert found["target_modules"] == [
      "model.layers.1.mlp.up_proj", "model.layers.1.self_attn.q_proj"]
  assert found["lora_alpha"] == 6 and isinstance(found["lora_alpha"], int)


def test_the_first_pattern_that_matches_counts(tmp_path):
  config, base = _model("llama")
  block = dataclasses.replace(
      LORA, rank_pattern={"q_proj": 2, r".*_proj": 4},
      alpha_pattern={"q_proj": 1.0, r".*_proj": 8.0})
  adapters = tiny.random_adapters(config, base, block)
  _write(tmp_path / "a", config, adapters, block)
  loaded = _read(tmp_path / "a", config).adapters
  np.testing.assert_array_equal(loaded.layers["q_proj"].scale, [0.5, 0.5])
  np.testing.assert_array_equal(loaded.layers["k_proj"].scale, [2.0, 2.0])


def test_methods_without_a_counterpart(tmp_path):
  config, _ = _model("llama")
  block = adapters_lib.AdapterConfig(method="full")
  content = peft_export.peft_config(
      block, adapters_lib.Adapters(), _paths(config))
  with pytest.raises(errors.UserError, match="--format=hf"):
    peft_export.write(
        tmp_path / "a", adapters_lib.Adapters(), content, _paths(config))
  assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A sound folder of ours: DoRA on q_proj and embed_tokens."""
  config, base = _model("llama")
  block = dataclasses.replace(
      LORA, method="dora", targets="q_proj,embed_tokens")
  folder = tmp_path_factory.mktemp("peft") / "adapter"
  _write(folder, config, tiny.random_adapters(config, base, block), block)
  return folder


REFUSED = {
    "bias": ("all", "bias='all'.*merge"),
    "modules_to_save": (["lm_head"], "modules_to_save"),
    "layer_replication": ([[0, 2], [1, 2]], "layer_replication.*of 3 layers"),
    "trainable_token_indices": ([1], "trainable_token_indices"),
    "target_parameters": (["x"], "target_parameters"),
    "alora_invocation_tokens": ([1], "alora_invocation_tokens"),
    "lora_bias": (True, "lora_bias"),
    "fan_in_fan_out": (True, "fan_in_fan_out"),
    "use_qalora": (True, "use_qalora"),
    "use_bdlora": ({"a": 1}, "use_bdlora"),
    "peft_type": ("OSFT", 'peft_type="OSFT".*supported: .*LORA'),
    "init_lora_weights": ("corda", "'corda' changed the base"),
    "r": ("many", "adapter_config.json is damaged"),
}


@pytest.mark.parametrize(
    "name", [*REFUSED, "lora_ga", "loftq", "no r"])
def test_refused_config(name, saved, tmp_path):
  folder = tmp_path / "adapter"
  shutil.copytree(saved, folder)
  content = json.loads((folder / peft_export.CONFIG).read_text())
  if name in REFUSED:
    content[name], message = REFUSED[name]
  elif name == "no r":
    del content["r"]
    message = "damaged or incomplete"
  else:
    content["init_lora_weights"], message = name, f"'{name}' changed the base"
  (folder / peft_export.CONFIG).write_text(json.dumps(content))
  _refused(folder, message)


def _refused(folder, message):
  with pytest.raises(errors.UserError, match=message) as caught:
    _read(folder, tiny.CONFIGS["llama"])
  assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


Q = "base_model.model.model.layers.0.self_attn.q_proj."
E = "base_model.model.model.embed_tokens."


def _drop(name):
  return lambda named: {k: v for k, v in named.items() if k != name}


TENSORS = {
    "no A": (_drop(Q + "lora_A.weight"), "q_proj has no lora_A"),
    "no B": (_drop(Q + "lora_B.weight"), "q_proj.lora_B.weight has shape None"),
    "no magnitude": (_drop(Q + "lora_magnitude_vector"),
                     "q_proj.lora_magnitude_vector has shape None"),
    "unknown part": (lambda t: t | {Q + "lora_C.weight": np.ones((2, 2))},
                     "lora_C.weight"),
    "another shape": (
        lambda t: t | {Q + "lora_B.weight": np.ones((7, 3), np.float32)},
        r"q_proj.lora_B.weight has shape \(7, 3\), .*needs \(32, 3\)"),
    "a layer too many": (
        lambda t: t | {k.replace("layers.0", "layers.9"): v
                       for k, v in t.items()},
        "layers.9.*belongs to no module.*another base"),
    "no prefix": (lambda t: {"x": np.ones(2)}, "tensor x belongs to no module"),
    "resized vocabulary": (
        lambda t: t | {E + "base_layer.weight": np.ones((64, 24))},
        r"\(64, 24\).*resized"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_refused_tensors(name, saved, tmp_path):
  folder = tmp_path / "adapter"
  shutil.copytree(saved, folder)
  edit, message = TENSORS[name]
  named = safetensors.numpy.load_file(folder / peft_export.WEIGHTS)
  safetensors.numpy.save_file(
      {k: np.ascontiguousarray(v) for k, v in edit(named).items()},
      folder / peft_export.WEIGHTS)
  _refused(folder, message)


def test_frozen_copies_are_left_out(saved, tmp_path):
  folder = tmp_path / "adapter"
  shutil.copytree(saved, folder)
  file = folder / peft_export.WEIGHTS
  named = safetensors.numpy.load_file(file)
  copy = np.ones((61, 24), np.float32)
  safetensors.numpy.save_file(
      named | {E + "base_layer.weight": copy,
               "base_model.model.lm_head.weight": copy}, file)
  loaded, expected = (
      _read(f, tiny.CONFIGS["llama"]).adapters for f in (folder, saved))
  for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(expected),
                  strict=True):
    np.testing.assert_array_equal(a, b)


def test_another_model(saved):
  wider = dataclasses.replace(tiny.CONFIGS["llama"], d_model=32)
  with pytest.raises(errors.UserError, match=r"needs.*another base"):
    _read(saved, wider)


def test_damaged_files(saved, tmp_path):
  folder = tmp_path / "adapter"
  _refused(folder, "adapter_config.json does not exist")
  shutil.copytree(saved, folder)
  file = folder / peft_export.WEIGHTS
  data = file.read_bytes()
  for n in (0, 5, 100, len(data) - 1):
    file.write_bytes(data[:n])
    _refused(folder, "is damaged")
  file.unlink()
  _refused(folder, "does not exist; save the adapter again")
  (folder / "adapter_model.bin").write_bytes(b"x")
  _refused(folder, "pickles are not read")
  for text in ("", "{", "[1]", "null", "{}"):
    (folder / peft_export.CONFIG).write_text(text)
    _refused(folder, "adapter_config.json")


def test_replaced_whole(saved, tmp_path):
  config, base = _model("llama")
  folder = tmp_path / "adapter"
  shutil.copytree(saved, folder)
  (folder / "stale").write_text("x")
  _write(folder, config, tiny.random_adapters(config, base, LORA), LORA)
  assert sorted(p.name for p in folder.iterdir()) == [
      peft_export.CONFIG, peft_export.WEIGHTS]
  assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
