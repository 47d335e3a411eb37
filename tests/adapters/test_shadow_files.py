"""ShadowPEFT: folders, Hugging Face PEFT, and what cannot be."""

from __future__ import annotations

import dataclasses
import functools
import json
import warnings

import jax
import numpy as np
import pytest
import safetensors.numpy

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax import types as types_lib
from lora_jax.adapters import registry
from lora_jax.adapters import shadow
from lora_jax.export import hf as hf_export
from lora_jax.export import peft as peft_export
from lora_jax.models import beside
from lora_jax.models import decoder
from lora_jax.models import init
from lora_jax.models import modules
from lora_jax.train import step as step_lib
from tests import tiny
from tests.adapters import contract
from tests.adapters import with_peft

CONFIG = contract.CONFIG


def model(**fields):
  """A base, and adapters of which everything matters."""
  _, tree = adapters_lib.build(
      jax.random.key(1), contract.block("shadow", **fields),
      contract.quantised("none"), tiny.paths(CONFIG),
      geometry=contract.GEOMETRY)
  return contract.quantised("none"), contract.moved(tree, 0.2)


def block_of(where=None, **options):
  return registry.checked(adapters_lib.AdapterConfig(
      method="shadow", rank=4, layers=where,
      options={"strength": 0.5} | options))


def test_loss_and_gradients_are_pefts(tmp_path):
  """With the loss of the shadow itself, which is most of this one."""
  peft = pytest.importorskip("peft")
  torch = pytest.importorskip("torch")
  config = block_of(auxiliary=0.7)
  tree = with_peft.build(config)
  with_peft.write(tmp_path / "a", config, tree)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    theirs = peft.PeftModel.from_pretrained(
        with_peft.torch_model(), str(tmp_path / "a"), is_trainable=True).eval()
  tokens = with_peft.TOKENS
  labels = torch.from_numpy(tokens.astype(np.int64))
  loss = theirs(labels, labels=labels).loss
  loss.backward()

  b, t = 2, tokens.shape[1] - 1
  data = types_lib.Batch(
      tokens=tokens[:, :-1], targets=tokens[:, 1:],
      loss_weights=np.ones((b, t), np.float32),
      positions=np.arange(t, dtype=np.int32)[None].repeat(b, 0),
      segment_ids=np.ones((b, t), np.int32),
      example_ids=np.arange(b, dtype=np.int32)[:, None].repeat(t, 1))
  frozen = adapters_lib.split(tree)[1]
  run = functools.partial(
      jax.jit(step_lib.loss_and_grads, static_argnames=("model", "settings")),
      model=with_peft.CONFIG, settings=step_lib.Settings())

  def step(tree):
    return run(*adapters_lib.split(tree), with_peft.base(),
               contract.stacked(data), jax.random.key(0))

  value, grads = step(tree)
  assert abs(value - loss.item()) / loss.item() <= 2e-6
  without, _ = step(dataclasses.replace(
      tree, shared=dataclasses.replace(tree.shared, auxiliary=0.0)))
  assert value - without > 1
  ours = peft_export.tensors(
      adapters_lib.join(grads, frozen), with_peft.PATHS)
  seen = 0
  for name, value in theirs.named_parameters():
    if value.requires_grad:
      own = ours.pop(name)
      if value.grad is None:  # T and G of the last layer.
        assert "layers.2.shadow_update" in name and not own.any()
        continue
      assert tiny.distance(own, value.grad.numpy()) < 2e-5, name
      seen += 1
  assert not ours and seen == 3 * 10 - 8 + 16 + 1


@pytest.mark.parametrize("where, options", [
    (None, {"layers": 1}), (None, {"layers": 4, "update": 7}),
    ("1-2", {}), ("0", {"layers": 2})])
def test_peft_computes_the_same(where, options, tmp_path):
  loaded, _ = with_peft.check(block_of(where, **options), tmp_path)
  assert loaded.config.options.layers == options.get("layers", 1)
  assert loaded.config.options.strength == 0.5


def theirs(torch_model, folder, **config):
  """PEFT's logits with everything of it random, and its folder."""
  peft = pytest.importorskip("peft")
  torch = pytest.importorskip("torch")
  torch.manual_seed(0)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    found = peft.get_peft_model(torch_model, peft.ShadowConfig(
        task_type="CAUSAL_LM", r=4, shadow_alpha=0.5, **config)).eval()
  with torch.no_grad():
    for value in found.parameters():
      if value.requires_grad:
        value += 0.1 * torch.randn_like(value)
  found.save_pretrained(str(folder))
  return tiny.torch_logits(found, with_peft.TOKENS)


# Of families that differ most.
FEW = "llama", "gemma3_text", "phi3"


@pytest.mark.parametrize("name", [
    x if x in FEW else pytest.param(x, marks=pytest.mark.slow)
    for x in sorted(tiny.CONFIGS)])
def test_shadows_of_every_family(name, tmp_path):
  """Windows, norms, biases, RoPE's extensions, fused modules, scaled
  embeddings: all are the small decoder's, too, of more layers than the
  model's. What was read is written again byte for byte."""
  config = tiny.CONFIGS[name]
  base = init.random_base(jax.random.key(1), config)
  expected = theirs(tiny.to_torch(config, base, tmp_path / "m"), tmp_path / "a",
                    shadow_num_hidden_layers=3)
  loaded = peft_export.read(
      tmp_path / "a", modules.paths(config), modules.shapes(config),
      geometry=modules.geometry(config))
  at = np.tile(np.arange(12, dtype=np.int32), (2, 1))
  found, plain = (tiny.logits(
      config, base, with_peft.TOKENS, at, np.ones_like(at), tree)
                  for tree in (loaded.adapters, None))
  assert tiny.distance(found, expected) < 2e-5
  assert tiny.distance(plain, expected) > 1e-3
  peft_export.write(
      tmp_path / "b", loaded.adapters, loaded.peft_config,
      modules.paths(config))
  first, second = (with_peft.tensors(tmp_path / n) for n in "ab")
  assert {k: v.tobytes() for k, v in first.items()} == {
      k: v.tobytes() for k, v in second.items()}
  # A new one has the same tensors, of the same shapes.
  _, tree = adapters_lib.build(
      jax.random.key(1), block_of(layers=3), base, modules.paths(config),
      geometry=modules.geometry(config))
  new = peft_export.tensors(tree, modules.paths(config))
  assert {k: v.shape for k, v in new.items()} == {
      k: v.shape for k, v in first.items()}


@pytest.mark.parametrize("fields, shape", [
    ({"shadow_hidden_size": 16, "shadow_num_attention_heads": 2}, (31, 16)),
    ({"shadow_hidden_size": 24, "shadow_intermediate_size": 20}, (31, 24)),
    ({"shadow_intermediate_size": 20}, None),
    ({"share_embeddings": False}, (31, 32)),
])
def test_shadows_of_other_widths_are_read(fields, shape, tmp_path):
  expected = theirs(with_peft.torch_model(), tmp_path / "a", **fields)
  loaded = with_peft.read(tmp_path / "a")
  assert tiny.distance(with_peft.logits(loaded.adapters), expected) < 2e-5
  assert tiny.distance(with_peft.logits(None), expected) > 1e-3
  table = loaded.adapters.shared.embed_tokens
  assert (table is None) == (shape is None)
  assert shape is None or table.shape == shape
  peft_export.write(
      tmp_path / "b", loaded.adapters, loaded.peft_config, with_peft.PATHS)
  first, second = (with_peft.tensors(tmp_path / n) for n in "ab")
  assert {k: v.tobytes() for k, v in first.items()} == {
      k: v.tobytes() for k, v in second.items()}


# --- what cannot be


def test_it_is_no_weight():
  base, tree = model()
  with pytest.raises(errors.UserError, match="ShadowLayer stands beside"):
    hf_export.merged(CONFIG, base, tree)


@pytest.mark.parametrize("first", ["lora", "shadow"])
def test_it_stands_alone(first):
  pair = [contract.block(name, **({} if name == "shadow" else {
      "targets": "q_proj", "rank_pattern": {}}))
          for name in sorted(("lora", "shadow"), key=lambda n: n != first)]
  with pytest.raises(errors.UserError, match="shadow has a decoder of its own"):
    adapters_lib.build(
        jax.random.key(0), pair, contract.quantised("none"),
        tiny.paths(CONFIG), geometry=contract.GEOMETRY)


@pytest.mark.parametrize("options, message", [
    ({"layers": 0}, "adapter.options.layers=0 is out of range"),
    ({"update": -1}, "adapter.options.update=-1 is out of range"),
    ({"auxiliary": -0.5}, "adapter.options.auxiliary=-0.5 is out of range"),
])
def test_options_that_cannot_be(options, message):
  with pytest.raises(errors.UsageError, match=message):
    registry.checked(contract.block("shadow", options=options))


def test_a_new_shadow_has_the_models_heads():
  with pytest.raises(errors.UsageError, match="heads=2: a new shadow has"):
    model(options={"heads": 2})


def test_peft_knows_no_gaps(tmp_path):
  """A layer between others is given hidden states and the state as one."""
  _, tree = model(layers="0,2")
  with pytest.raises(errors.UserError, match="leaves layers between others"):
    with_peft.write(tmp_path / "a", contract.block("shadow"), tree)
  with pytest.raises(AttributeError, match="'ShadowCarrier' object has no"):
    theirs(with_peft.torch_model(), tmp_path / "b",
           target_modules=["model.layers.0", "model.layers.2"])


def test_peft_leaves_out_the_cap_of_the_shadows_logits(tmp_path):
  """In the shadow's own loss of Gemma 2, whose logits have one."""
  peft = pytest.importorskip("peft")
  torch = pytest.importorskip("torch")
  config = tiny.CONFIGS["gemma2"]
  base = init.random_base(jax.random.key(1), config)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    found = peft.get_peft_model(
        tiny.to_torch(config, base, tmp_path / "m"), peft.ShadowConfig(
            task_type="CAUSAL_LM", auxiliary_loss_weight=1.0)).eval()
  found.save_pretrained(str(tmp_path / "a"))
  labels = torch.from_numpy(with_peft.TOKENS.astype(np.int64))
  with torch.no_grad():
    out = found(labels, labels=labels)
  tree = peft_export.read(
      tmp_path / "a", modules.paths(config), modules.shapes(config),
      geometry=modules.geometry(config)).adapters
  at = np.tile(np.arange(12, dtype=np.int32), (2, 1))
  state, _ = beside.begun(
      decoder.forward, config, base, tree, with_peft.TOKENS, at,
      np.ones_like(at))

  def loss(config):
    logits = decoder.unembed(config, base, None, state)[:, :-1]
    picked = np.take_along_axis(
        jax.nn.log_softmax(logits), with_peft.TOKENS[:, 1:, None], -1)
    return -float(picked.mean())

  shown = float(out.shadow_loss)
  plain = loss(dataclasses.replace(config, final_softcap=None))
  assert abs(plain - shown) < 1e-5 * shown
  assert abs(loss(config) - shown) > 0.1


def test_a_folder_that_cannot_be(tmp_path):
  tree = with_peft.build(block_of("0-1"))
  with_peft.write(tmp_path / "a", block_of("0-1"), tree)
  place = tmp_path / "a" / peft_export.CONFIG
  config = json.loads(place.read_text())
  assert config["target_modules"] == ["model.layers.0", "model.layers.1"]

  def read(**fields):
    place.write_text(json.dumps(config | fields))
    return with_peft.read(tmp_path / "a")

  with pytest.raises(errors.UserError, match="is a network of its own kind"):
    read(shadow_model="some/model")
  with pytest.raises(errors.UserError, match=r"layers\.1\..* is missing"):
    read(shadow_num_hidden_layers=2)
  with pytest.raises(errors.UserError, match=r"gate.*has shape \(4,\), this"):
    read(update_hidden_size=5)
  read()
  tensors = with_peft.tensors(tmp_path / "a")
  name = f"base_model.{shadow.BACKBONE}.layers.0.mlp.up_proj.weight"

  def changed(changes):
    safetensors.numpy.save_file(
        tensors | changes, tmp_path / "a" / peft_export.WEIGHTS)
    return with_peft.read(tmp_path / "a")

  with pytest.raises(errors.UserError, match=r"up_proj.*has shape \(48, 31\)"):
    changed({name: tensors[name][:, 1:]})
  with pytest.raises(errors.UserError, match=r"head.*is no part of a shadow"):
    changed({"base_model.shadow_head.default.weight": tensors[name]})
  changed({})
