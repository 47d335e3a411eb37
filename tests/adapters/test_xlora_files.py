"""X-LoRA: folders, Hugging Face PEFT, and what cannot be."""

from __future__ import annotations

import dataclasses
import json
import warnings

import jax
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax.adapters import registry
from lora_jax.adapters import xlora
from lora_jax.export import hf as hf_export
from lora_jax.export import peft as peft_export
from tests import tiny
from tests.adapters import contract
from tests.adapters import passes
from tests.adapters import with_peft

CONFIG = contract.CONFIG


model = passes.xlora


BLOCK = adapters_lib.AdapterConfig(
    method="xlora", rank=4, alpha=8.0, targets="q_proj,up_proj,down_proj",
    rank_pattern={"layers.1.mlp.up_proj": 2})
VARIANTS = {
    "depth 1": {"depth": 1},
    "depth 2": {"depth": 2, "dropout": 0.0, "temperature": 0.5},
    "layerwise": {"depth": 3, "layerwise": True, "weight": 1.5},
    "top": {"depth": 2, "top": 2, "layerwise": True},
    "softmax of top": {"softmax": False, "softmax_top": True, "top": 2},
    "two softmaxes": {"softmax_top": True, "top": 2},
}


def block(**options):
  return registry.checked(dataclasses.replace(
      BLOCK, options={"experts": 3, "size": 8} | options))


@pytest.mark.parametrize("name", VARIANTS)
def test_peft_computes_the_same(name, tmp_path):
  with_peft.check(block(**VARIANTS[name]), tmp_path)


def lora_folder(folder, seed, **config):
  """A LoRA that PEFT has made, with random values."""
  import peft
  import torch

  model = peft.get_peft_model(with_peft.torch_model(), peft.LoraConfig(
      task_type="CAUSAL_LM", **config))
  torch.manual_seed(seed)
  with torch.no_grad():
    for name, value in model.named_parameters():
      if "lora_" in name:
        value.copy_(0.3 * torch.randn_like(value))
  model.save_pretrained(str(folder))


def theirs(paths, **config):
  """PEFT's X-LoRA of these folders, with a classifier that matters."""
  import peft
  import torch

  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    model = peft.get_peft_model(with_peft.torch_model(), peft.XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=32,
        adapters={str(n): str(p) for n, p in enumerate(paths)}, **config))
  torch.manual_seed(5)
  with torch.no_grad():
    for value in model.base_model.internal_xlora_classifier.parameters():
      value += 0.5 * torch.randn_like(value)
  return model.eval()


@pytest.fixture
def folders(tmp_path):
  pytest.importorskip("peft")
  lora_folder(tmp_path / "e0", 0, r=4, lora_alpha=8, target_modules=[
      "q_proj", "up_proj"], lora_dropout=0.1)
  lora_folder(tmp_path / "e1", 1, r=2, lora_alpha=3, use_rslora=True,
              target_modules=["down_proj", "q_proj"],
              rank_pattern={"layers.1.self_attn.q_proj": 3},
              alpha_pattern={"layers.0.mlp.down_proj": 5})
  return [tmp_path / "e0", tmp_path / "e1"]


@pytest.mark.parametrize("trainable", [False, True])
def test_experts_that_peft_has_made(trainable, folders, tmp_path):
  """Of different ranks, scales and modules; frozen ones stay where they are,
  trained ones are ours to save. Saved again, and moved, they are the same."""
  model = theirs(
      folders, layerwise_scalings=True, use_trainable_adapters=trainable)
  expected = tiny.torch_logits(model, with_peft.TOKENS)
  model.peft_config["default"].use_trainable_adapters = False
  with_peft.save(model, tmp_path / "a")
  config = json.loads((tmp_path / "a" / peft_export.CONFIG).read_text())
  config["use_trainable_adapters"] = trainable
  (tmp_path / "a" / peft_export.CONFIG).write_text(json.dumps(config))
  loaded = with_peft.read(tmp_path / "a")
  assert tiny.distance(with_peft.logits(loaded.adapters), expected) < 2e-5
  assert tiny.distance(with_peft.logits(None), expected) > 1e-2
  assert loaded.config.method == "xlora" and loaded.config.rank == 4
  assert loaded.config.options.trainable is trainable
  assert loaded.config.dropout == np.float32(0.1)
  assert [type(one) for one in loaded.adapters.layers.values()] == [
      xlora.Experts if trainable else xlora.FrozenExperts] * 3
  e = loaded.adapters.layers["q_proj"]
  np.testing.assert_array_equal(e.ranks, [[4, 2], [4, 3], [4, 2]])
  np.testing.assert_allclose(e.scales[1], [2, 3 / 3 ** 0.5], rtol=1e-6)
  np.testing.assert_allclose(e.rates[1], [0.1, 0])
  e = loaded.adapters.layers["down_proj"]
  np.testing.assert_array_equal(e.ranks, [[0, 2]] * 3)
  np.testing.assert_allclose(
      e.scales[:, 1], np.asarray([5, 3, 3]) / 2 ** 0.5, rtol=1e-6)

  def write(name, one):
    peft_export.write(tmp_path / name, one.adapters, one.peft_config,
                      with_peft.PATHS)
    return {str(p.relative_to(tmp_path / name)): p.read_bytes()
            for p in sorted((tmp_path / name).rglob("*")) if p.is_file()}

  first = write("b", loaded)
  inside = {f"{n}/{f}" for n in (0, 1) for f in (
      peft_export.CONFIG, peft_export.WEIGHTS)}
  assert set(first) == {peft_export.CONFIG, peft_export.WEIGHTS} | (
      inside if trainable else set())
  (tmp_path / "b").rename(tmp_path / "elsewhere")
  back = with_peft.read(tmp_path / "elsewhere")
  assert write("c", back) == first
  np.testing.assert_array_equal(
      with_peft.logits(back.adapters), with_peft.logits(loaded.adapters))


def test_relative_paths_are_in_the_folder_or_here(
    folders, tmp_path, monkeypatch):
  model = theirs(folders)
  expected = tiny.torch_logits(model, with_peft.TOKENS)
  model.peft_config["default"].adapters = {"0": "e0", "1": "e1"}
  with_peft.save(model, tmp_path / "a")
  with pytest.raises(errors.UserError, match="adapters names e0, which is no"):
    with_peft.read(tmp_path / "a")
  monkeypatch.chdir(tmp_path)  # As PEFT finds them.
  loaded = with_peft.read(tmp_path / "a")
  assert tiny.distance(with_peft.logits(loaded.adapters), expected) < 2e-5
  peft_export.write(
      tmp_path / "b", loaded.adapters, loaded.peft_config, with_peft.PATHS)
  monkeypatch.chdir("/")
  back = with_peft.read(tmp_path / "b")
  assert back.peft_config["adapters"] == {"0": "e0", "1": "e1"}
  assert tiny.distance(with_peft.logits(back.adapters), expected) < 2e-5


def test_experts_are_counted_not_sorted(tmp_path):
  """Eleven, whose names PEFT sorts as text; others stand as they do."""
  tree = with_peft.build(block(experts=11))
  with_peft.write(tmp_path / "a", block(experts=11), tree)
  place = tmp_path / "a" / peft_export.CONFIG
  config = json.loads(place.read_text())
  place.write_text(json.dumps(config, sort_keys=True))
  assert list(json.loads(place.read_text())["adapters"])[:3] == ["0", "1", "10"]
  first = with_peft.logits(with_peft.read(tmp_path / "a").adapters)
  np.testing.assert_array_equal(first, with_peft.logits(tree))
  names = {f"{chr(ord('z') - n)}": str(n) for n in range(11)}
  place.write_text(json.dumps(config | {"adapters": names}))
  np.testing.assert_array_equal(
      with_peft.logits(with_peft.read(tmp_path / "a").adapters), first)


def test_what_peft_saves(folders, tmp_path):
  """PEFT 0.21.2 takes layers of a number for an expert's of that name: its
  folder has no classifier, which PEFT then draws anew. We say so."""
  import peft
  import torch

  model = theirs(folders)
  expected = tiny.torch_logits(model, with_peft.TOKENS)
  model.save_pretrained(str(tmp_path / "a"))
  assert not with_peft.tensors(tmp_path / "a")
  torch.manual_seed(0)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    again = peft.PeftModel.from_pretrained(
        with_peft.torch_model(), str(tmp_path / "a")).eval()
  assert tiny.distance(
      tiny.torch_logits(again, with_peft.TOKENS), expected) > 1e-3
  with pytest.raises(errors.UserError, match="leaves the classifier out"):
    with_peft.read(tmp_path / "a")
  # What the error tells to do.
  import safetensors.torch

  safetensors.torch.save_file(
      {k: v for k, v in model.state_dict().items()
       if "internal_xlora_classifier" in k},
      tmp_path / "a" / peft_export.WEIGHTS)
  loaded = with_peft.read(tmp_path / "a")
  assert tiny.distance(with_peft.logits(loaded.adapters), expected) < 2e-5


# --- what cannot be


def test_it_is_no_weight():
  base, tree = model()
  _, tensors = hf_export.merged(CONFIG, base, tree)
  with pytest.raises(errors.UserError, match="use --format=peft"):
    list(tensors)


@pytest.mark.parametrize("first", ["lora", "xlora"])
def test_it_stands_alone(first):
  pair = [contract.block(name, targets="q_proj", rank_pattern={})
          for name in sorted(("lora", "xlora"), key=lambda n: n != first)]
  with pytest.raises(errors.UserError, match="xlora looks at the model"):
    adapters_lib.build(
        jax.random.key(0), pair, contract.quantised("none"),
        tiny.paths(CONFIG), geometry=contract.GEOMETRY)


def test_the_head_is_not_its_own():
  with pytest.raises(errors.UsageError, match='"lm_head" stands behind'):
    adapters_lib.build(
        jax.random.key(0), contract.block(
            "xlora", targets="q_proj,lm_head", rank_pattern={}),
        contract.quantised("none"), tiny.paths(CONFIG),
        geometry=contract.GEOMETRY)


@pytest.mark.parametrize("options, message", [
    ({"experts": 0}, "adapter.options.experts=0 is out of range"),
    ({"experts": 3, "top": 4}, "adapter.options.top=4 is out of range"),
    ({"depth": 0}, "adapter.options.depth=0 is out of range"),
    ({"temperature": 0.0}, "adapter.options.temperature=0.0 is out of range"),
    ({"dropout": 1.0}, "adapter.options.dropout=1.0 is out of range"),
])
def test_options_that_cannot_be(options, message):
  with pytest.raises(errors.UsageError, match=message):
    adapters_lib.METHODS["xlora"].options(**options).validate()


def test_a_folder_that_cannot_be(folders, tmp_path):
  tree = with_peft.build(block(depth=2))
  with_peft.write(tmp_path / "a", block(depth=2), tree)
  place = tmp_path / "a" / peft_export.CONFIG
  config = json.loads(place.read_text())

  def read(**fields):
    place.write_text(json.dumps(config | fields))
    return with_peft.read(tmp_path / "a")

  with pytest.raises(errors.UserError, match="is not what this method has"):
    read(xlora_depth=3)
  with pytest.raises(errors.UserError, match="the classifier is not of"):
    read(xlora_size=7)
  with pytest.raises(errors.UserError, match=r"pass_value=0\.5 gives"):
    read(scaling_pass_value=0.5)
  lora_folder(tmp_path / "dora", 0, target_modules=["q_proj"], use_dora=True)
  with pytest.raises(errors.UserError, match="one is dora of these"):
    read(adapters={"0": str(tmp_path / "dora"), "1": "1", "2": "2"})
  read()
