"""Merged models load in transformers and compute what ours compute."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax import quant
from lora_jax.adapters import runs
from lora_jax.export import hf as hf_export
from lora_jax.models import hf
from lora_jax.models import init
from lora_jax.models import load
from lora_jax.models import registry
from tests import tiny

TOKENS = np.random.default_rng(0).integers(0, 61, (2, 24)).astype(np.int32)
POSITIONS = np.broadcast_to(np.arange(24, dtype=np.int32), (2, 24))
ONES = np.ones((2, 24), np.int32)

LORA = adapters_lib.AdapterConfig(rank=3, alpha=6.0, dropout=0.25)
DORA = dataclasses.replace(LORA, method="dora")
RSLORA = dataclasses.replace(
    LORA, method="rslora", rank_pattern={"q_proj": 2, "layers.1.mlp.*": 5},
    alpha_pattern={"v_proj": 1.0}, layers="1")
# family, adapter block, quantisation.
CASES = {
    "llama lora": ("llama", LORA, None),
    "llama dora nf4": ("llama", DORA, "nf4"),
    "mistral rslora patterns": ("mistral", RSLORA, None),
    "qwen2 tied": ("qwen2", LORA, None),
    "qwen2 tied embeddings adapted": (
        "qwen2", dataclasses.replace(DORA, targets="embed_tokens,q_proj"),
        None),
    "qwen3 int8 head adapted": (
        "qwen3", dataclasses.replace(LORA, targets=("all-linear", "lm_head")),
        "int8"),
    "qwen3 full": ("qwen3", adapters_lib.AdapterConfig(method="full"), None),
    "gemma2 dora nf4": ("gemma2", DORA, "nf4"),
    "gemma3_text embeddings adapted": (
        "gemma3_text", dataclasses.replace(
            LORA, targets=("all-linear", "embed_tokens")), None),
    "phi3 rslora patterns": ("phi3", RSLORA, None),
    "mistral none": (
        "mistral", adapters_lib.AdapterConfig(method="none"), None),
}


def _model(family, block, form):
  config = dataclasses.replace(tiny.CONFIGS[family], eos_ids=(2, 5))
  base = init.random_base(jax.random.key(1), config)
  if form:
    spec = quant.QuantSpec(format=form, block_size=8, double=False)
    base = base.replace(layers={
        name: part.replace(weight=quant.quantize(part.weight, spec))
        if hasattr(part, "weight") else part
        for name, part in base.layers.items()})
  if block.method in ("full", "none"):
    base, adapters = adapters_lib.build(
        jax.random.key(0), block, base, tiny.paths(config))
    if block.method == "full":
      adapters = jax.tree.map(lambda x: 1.1 * x, adapters)
    return config, base, adapters
  return config, base, tiny.random_adapters(config, base, block)


def _ours(config, base, adapters):
  return tiny.logits(config, base, TOKENS, POSITIONS, ONES, adapters)


# Seconds each; others have all that these have.
LIKE_OTHERS = (
    "llama lora", "qwen2 tied", "mistral none", "mistral rslora patterns",
    "qwen3 int8 head adapted")


@pytest.mark.parametrize("case", [
    pytest.param(x, marks=pytest.mark.slow) if x in LIKE_OTHERS else x
    for x in CASES])
def test_transformers_computes_the_same(case, tmp_path):
  pytest.importorskip("torch")
  import transformers

  config, base, adapters = _model(*CASES[case])
  ours = _ours(config, base, adapters)
  hf_export.write(tmp_path / "out", config, base, adapters)
  model, info = transformers.AutoModelForCausalLM.from_pretrained(
      tmp_path / "out", attn_implementation="eager", output_loading_info=True)
  assert not any(info.values()), info
  assert model.dtype.itemsize == 4
  assert model.generation_config.eos_token_id == [2, 5]
  assert tiny.distance(
      ours, tiny.torch_logits(model.eval(), TOKENS)) <= 2e-5
  if CASES[case][1].method != "none" and CASES[case][1].method != "full":
    assert tiny.distance(ours, _ours(config, base, None)) > 1e-2


@pytest.mark.parametrize("case", [
    "llama dora nf4", "qwen2 tied embeddings adapted", "qwen3 full",
    "phi3 rslora patterns"])
def test_loads_here_again(case, tmp_path):
  config, base, adapters = _model(*CASES[case])
  hf_export.write(tmp_path / "out", config, base, adapters)
  again = load.load(str(tmp_path / "out"))
  assert tiny.distance(
      _ours(config, base, adapters),
      _ours(again.config, again.base, None)) <= 2e-6


def test_tied_head_stays_as_it_was(tmp_path):
  config, base, adapters = _model(*CASES["qwen2 tied embeddings adapted"])
  merged, tensors = hf_export.merged(config, base, adapters)
  named = dict(tensors)
  assert config.tie_embeddings and not merged.tie_embeddings
  np.testing.assert_array_equal(named["lm_head.weight"], base.embed_tokens)
  assert tiny.distance(
      named["model.embed_tokens.weight"], base.embed_tokens) > 1e-2


def test_untouched_weights_are_exact():
  config, base, _ = _model(*CASES["mistral none"])
  _, tensors = hf_export.merged(config, base, None)
  expected = dict(hf.state(config, base, np.float32))
  named = dict(tensors)
  assert named.keys() == expected.keys()
  for name, value in named.items():
    np.testing.assert_array_equal(value, expected[name])


def test_merge_by_hand():
  """W^T + s (A B)^T, in numpy, of one module; a bias is left alone."""
  config, base, adapters = _model(*CASES["mistral rslora patterns"])
  named = dict(hf_export.merged(config, base, adapters)[1])
  adapter, at = runs.at(adapters.layers["up_proj"], 1)
  w = np.asarray(base.layers["up_proj"].weight, np.float64)
  a, b = (np.asarray(x, np.float64) for x in (adapter.a[at], adapter.b[at]))
  scale = 6.0 / np.sqrt(5)
  np.testing.assert_allclose(
      named["model.layers.1.mlp.up_proj.weight"], (w[1] + scale * a @ b).T,
      rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(
      named["model.layers.0.mlp.up_proj.weight"], w[0].T.astype(np.float32))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_shards_and_types(dtype, tmp_path):
  config, base, adapters = _model(*CASES["llama lora"])
  folder = tmp_path / "deep" / "out"
  limit = 2 * 61 * 24 + 1000
  hf_export.write(
      folder, config, base, adapters, dtype=dtype, shard_bytes=limit)
  index = json.loads((folder / hf.INDEX).read_text())
  files = sorted(set(index["weight_map"].values()))
  assert files == sorted(p.name for p in folder.glob("*.safetensors"))
  assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}" \
      ".safetensors"
  expected = dict(hf_export.merged(config, base, adapters, "float32")[1])
  total = 0
  for file in files:
    with safetensors.safe_open(folder / file, framework="flax") as f:
      assert f.metadata() == {"format": "pt"}
      size = 0
      names = f.keys()  # The file itself cannot be iterated over.
      for name in names:
        value = f.get_tensor(name)
        assert index["weight_map"][name] == file and value.dtype == dtype
        np.testing.assert_array_equal(
            value, jnp.asarray(expected.pop(name)).astype(dtype))
        size += value.nbytes
      assert size <= limit
      total += size
  assert not expected and index["metadata"]["total_size"] == total
  assert json.loads((folder / "config.json").read_text())["dtype"] == dtype


def test_plan():
  shapes = {"a": (3,), "b": (2,), "c": (10,), "d": (1,), "e": (4,)}
  assert hf_export.plan(shapes, 2, 10) == [["a", "b"], ["c"], ["d", "e"]]
  assert hf_export.plan(shapes, 2, 1000) == [list(shapes)]


def test_tokenizer_and_generation_config(tmp_path):
  import transformers

  config, base, adapters = _model(*CASES["llama lora"])
  tokenizer = tiny.byte_tokenizer()
  hf_export.write(tmp_path / "out", config, base, adapters,
                  tokenizer=tokenizer)
  again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
  assert again("né")["input_ids"] == tokenizer("né")["input_ids"]
  assert again.chat_template == tokenizer.chat_template
  content = json.loads((tmp_path / "out/generation_config.json").read_text())
  assert content == {"eos_token_id": [2, 5, tokenizer.eos_token_id]}


def test_replaces_whole_and_survives_failure(tmp_path, monkeypatch):
  config, base, adapters = _model(*CASES["llama lora"])
  folder = tmp_path / "out"
  hf_export.write(folder, config, base, None)
  (folder / "stale.txt").write_text("x")
  before = (folder / "model.safetensors").read_bytes()
  broken = jax.tree.map(lambda x: x * jnp.nan, adapters)
  with pytest.raises(errors.UserError, match="not finite") as caught:
    hf_export.write(folder, config, base, broken)
  assert "\n" not in str(caught.value)
  assert (folder / "model.safetensors").read_bytes() == before
  hf_export.write(folder, config, base, adapters)
  assert (folder / "model.safetensors").read_bytes() != before
  assert sorted(p.name for p in folder.iterdir()) == [
      "config.json", "generation_config.json", "model.safetensors"]
  assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_kill_between_the_renames_loses_nothing(tmp_path):
  config, base, _ = _model(*CASES["llama lora"])
  folder = tmp_path / "out"
  hf_export.write(folder, config, base, None)
  before = (folder / "model.safetensors").read_bytes()
  folder.rename(tmp_path / "out.old")
  broken = base.replace(norm=base.norm * jnp.inf)
  with pytest.raises(errors.UserError, match=r"model\.norm\.weight"):
    hf_export.write(folder, config, broken, None)
  assert (folder / "model.safetensors").read_bytes() == before


def test_leaves_other_folders_alone(tmp_path):
  config, base, _ = _model(*CASES["llama lora"])
  (tmp_path / "letter.txt").write_text("dear")
  with pytest.raises(errors.UserError, match="holds other files"):
    hf_export.write(tmp_path, config, base, None)
  with pytest.raises(errors.UserError, match="is a file"):
    hf_export.write(tmp_path / "letter.txt", config, base, None)
  assert (tmp_path / "letter.txt").read_text() == "dear"


def test_too_large_for_float16(tmp_path):
  config, base, _ = _model(*CASES["llama lora"])
  big = base.replace(embed_tokens=base.embed_tokens * 1e6)
  with pytest.raises(errors.UserError, match=r"embed_tokens.*float16.*bfloat"):
    hf_export.write(tmp_path / "out", config, big, None, dtype="float16")
  assert not list(tmp_path.iterdir())


def test_unknown_dtype(tmp_path):
  config, base, _ = _model(*CASES["llama lora"])
  with pytest.raises(errors.UsageError, match='did you mean "float16"'):
    hf_export.write(tmp_path / "out", config, base, None, dtype="flaot16")


@pytest.mark.parametrize("family", sorted(tiny.CONFIGS))
def test_config_comes_back(family):
  config = tiny.CONFIGS[family]
  assert registry.from_hf(config.to_hf()) == config
