"""Layer replication: PEFT's deeper model out of the same weights."""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import warnings

import jax
import numpy as np
import pytest
import safetensors.numpy

from lora_jax import adapters as adapters_lib
from lora_jax import api
from lora_jax import errors
from lora_jax import host as host_lib
from lora_jax.adapters import depth
from lora_jax.data import dataset
from lora_jax.data import templates
from lora_jax.evaluate import generate
from lora_jax.export import hf as hf_export
from lora_jax.export import peft as peft_export
from lora_jax.models import init
from lora_jax.models import modules
from lora_jax.train import loop
from lora_jax.train import step as step_lib
from tests import tiny
from tests.adapters import contract

TOKENS = np.random.default_rng(0).integers(0, 61, (2, 12)).astype(np.int32)
POSITIONS = np.tile(np.arange(12, dtype=np.int32), (2, 1))
ONES = np.ones((2, 12), np.int32)
# Layers 0 1 1 2 of three.
RANGES, ORDER = "0-2,1-3", (0, 1, 1, 2)
BLOCK = adapters_lib.AdapterConfig(
    rank=3, alpha=6.0, layer_replication=RANGES)


def config_of(family):
  config = dataclasses.replace(tiny.CONFIGS[family], n_layers=3)
  windows = config.window_layers and (True, False, True)
  return dataclasses.replace(config, window_layers=windows)


@functools.cache
def parts(family="llama", method="lora"):
  """(shallow config, replicated config, base, adapters)."""
  config = config_of(family)
  base = init.random_base(jax.random.key(1), config)
  deep = config.replicated(depth.order(RANGES, config.n_layers))
  _, tree = adapters_lib.build(
      jax.random.key(0), dataclasses.replace(BLOCK, method=method), base,
      modules.paths(deep), geometry=modules.geometry(deep),
      order=deep.layer_order)
  return config, deep, base, tiny.mask(contract.moved(tree, 0.2))


def copied(deep, base):
  """The same model with weights of its own in every layer."""
  layers = jax.tree.map(lambda x: x[np.asarray(ORDER)], base.layers)
  return (dataclasses.replace(deep, layer_order=()),
          dataclasses.replace(base, layers=layers))


def logits(config, base, tree):
  return tiny.logits(config, base, TOKENS, POSITIONS, ONES, tree)


def write(folder, deep, tree, method="lora"):
  block = dataclasses.replace(BLOCK, method=method)
  paths = modules.paths(deep)
  peft_export.write(
      folder, tree, peft_export.peft_config(block, tree, paths, "a/b"), paths)


def read(folder, deep):
  return peft_export.read(folder, modules.paths(deep), modules.shapes(deep),
                          geometry=modules.geometry(deep))


def test_ranges():
  assert depth.ranges("0-4, 2-5") == [[0, 4], [2, 5]]
  assert depth.ranges([[0, 4], (2, 5)]) == [[0, 4], [2, 5]]
  assert depth.order("0-4,2-5", 5) == (0, 1, 2, 3, 2, 3, 4)
  assert depth.order("1-3", 4) == (1, 2)
  assert depth.order("0-2,2-4", 4) == depth.order("", 4) == ()
  for text, message in (
      ("0-4;2-5", 'write "0-4,2-5"'), ("4-2", '"4-2" is no range'),
      ("3", '"3" is no range'), ("0-6", "layers 0 to 4; end at 5")):
    with pytest.raises(errors.UsageError, match=message):
      depth.order(text, 5)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_peft_loads_ours(method, tmp_path):
  pytest.importorskip("torch")
  peft = pytest.importorskip("peft")

  config, deep, base, tree = parts(method=method)
  write(tmp_path / "a", deep, tree, method)
  written = json.loads((tmp_path / "a" / peft_export.CONFIG).read_text())
  assert written["layer_replication"] == [[0, 2], [1, 3]]
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    model = peft.PeftModel.from_pretrained(
        tiny.to_torch(config, base, tmp_path / "base"), str(tmp_path / "a"))
  names = {n for n in peft.get_peft_model_state_dict(model)}
  assert names == set(safetensors.numpy.load_file(
      tmp_path / "a" / peft_export.WEIGHTS))
  ours = logits(deep, base, tree)
  assert tiny.distance(ours, tiny.torch_logits(model.eval(), TOKENS)) <= 2e-5
  assert tiny.distance(ours, logits(deep, base, None)) > 1e-2
  assert tiny.distance(logits(deep, base, None), logits(
      config, base, None)) > 1e-2


def test_ours_loads_peft(tmp_path):
  torch = pytest.importorskip("torch")
  peft = pytest.importorskip("peft")

  config, deep, base, _ = parts()
  torch.manual_seed(0)
  model = peft.get_peft_model(
      tiny.to_torch(config, base, tmp_path / "base"), peft.LoraConfig(
          r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"],
          layer_replication=[[0, 2], [1, 3]], init_lora_weights=False,
          task_type="CAUSAL_LM"))
  model.save_pretrained(tmp_path / "a")
  assert peft_export.replication(tmp_path / "a") == ((0, 2), (1, 3))
  loaded = read(tmp_path / "a", deep)
  assert loaded.config.layer_replication == ((0, 2), (1, 3))
  assert loaded.adapters.layers["q_proj"].a.shape[0] == 4
  assert tiny.distance(
      logits(deep, base, loaded.adapters),
      tiny.torch_logits(model.eval(), TOKENS)) <= 2e-5
  peft_export.write(tmp_path / "b", loaded.adapters, loaded.peft_config,
                    modules.paths(deep))
  first, second = (safetensors.numpy.load_file(
      tmp_path / f / peft_export.WEIGHTS) for f in "ab")
  assert first.keys() == second.keys()
  for name, value in first.items():
    np.testing.assert_array_equal(value, second[name])
  with pytest.raises(errors.UserError, match="of 4 layers, this one has 3"):
    read(tmp_path / "a", config)


@pytest.mark.parametrize("family", ["gemma2", "qwen3"])
def test_windows_are_those_of_the_repeated_layers(family, tmp_path):
  """PEFT 0.21.2 goes by the new numbers there, and past the end of the list:
  the mask of layer i is that of `layer_types[i]`, of a list as long as the
  shallow model. What is right is the model with its weights copied."""
  config, deep, base, tree = parts(family)
  assert deep.window_layers == (True, False, False, True)
  ours = logits(deep, base, tree)
  assert tiny.distance(ours, logits(*copied(deep, base), tree)) < 1e-6
  # And in transformers, with the adapters merged.
  pytest.importorskip("torch")
  import transformers

  hf_export.write(tmp_path / "m", deep, base, tree)
  merged = transformers.AutoModelForCausalLM.from_pretrained(
      tmp_path / "m", attn_implementation="eager").eval()
  assert merged.config.num_hidden_layers == 4
  assert tiny.distance(ours, tiny.torch_logits(merged, TOKENS)) <= 2e-5
  peft = pytest.importorskip("peft")
  write(tmp_path / "a", deep, tree)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    theirs = peft.PeftModel.from_pretrained(
        tiny.to_torch(config, base, tmp_path / "base"), str(tmp_path / "a"))
  with pytest.raises(IndexError):
    tiny.torch_logits(theirs.eval(), TOKENS)


@functools.partial(jax.jit, static_argnames=("model", "settings"))
def gradient(params, frozen, base, model, settings):
  data = contract.stacked(contract.batch())
  return step_lib.loss_and_grads(
      params, frozen, base, data, jax.random.key(0), model=model,
      settings=settings)


@pytest.mark.parametrize("host, remat, offload", [
    (False, "named", ()), (True, "named", ()),
    (False, "none", ("activations",))])
def test_training_is_that_of_copied_weights(host, remat, offload):
  _, deep, base, tree = parts()
  params, frozen = adapters_lib.split(tree)
  settings = step_lib.Settings(remat=remat, offload=offload)
  config, copy = copied(deep, base)
  value, grads = gradient(
      params, frozen, copy, config, step_lib.Settings(remat="full"))
  got, ours = gradient(
      params, frozen, host_lib.placed(base) if host else base, deep, settings)
  assert abs(got - value) <= 1e-6 * abs(value)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(grads)):
    assert np.abs(b).max() > 0
    np.testing.assert_allclose(
        a, b, rtol=1e-4, atol=1e-5 * float(np.abs(b).max()))


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_generation_is_that_of_copied_weights(method):
  _, deep, base, tree = parts(method=method)
  prompts = [[3, 1, 4, 1], [5, 9]]
  config, copy = copied(deep, base)
  found = generate.generate(deep, base, tree, prompts, max_new_tokens=6)
  assert found == generate.generate(
      config, copy, tree, prompts, max_new_tokens=6)
  assert found != generate.generate(
      deep, base, None, prompts, max_new_tokens=6)


# Three runs; the tests above have what each reads and computes.
@pytest.mark.slow
def test_training_goes_on_and_is_saved(tmp_path, monkeypatch):
  """`adapt`, a killed run, and a folder that is read again."""
  config, deep, base, _ = parts()
  model = api.Model(
      config=config, base=base,
      tokenizer=types.SimpleNamespace(chat_template=None, eos_token_id=0),
      fingerprint="0" * 64, source="tiny")
  adapted = model.adapt(rank=2, layer_replication=[[0, 2], [1, 3]])
  assert adapted.config == deep and adapted.base is base
  rows = dataset.of([templates.Encoded(
      tokens=TOKENS[0], weights=np.ones(12, np.float32))] * 4)

  def train(folder, steps):
    return adapted.train(
        rows, workdir=tmp_path / folder, max_length=12,
        config=api.TrainConfig(steps=steps, batch_size=2, checkpoint_every=1))

  straight, outcome = train("a", 3)
  assert outcome.state.step == 3
  step = loop._Run._step

  def dying(run, state, i):
    if i == 2:
      raise KeyboardInterrupt
    return step(run, state, i)

  monkeypatch.setattr(loop._Run, "_step", dying)
  with pytest.raises(KeyboardInterrupt):
    train("b", 3)
  monkeypatch.setattr(loop._Run, "_step", step)
  resumed, _ = train("b", 3)
  for a, b in zip(jax.tree.leaves(straight.adapters),
                  jax.tree.leaves(resumed.adapters)):
    np.testing.assert_array_equal(a, b)
  straight.save(tmp_path / "adapter")
  again = model.with_adapter(tmp_path / "adapter")
  assert again.config == deep
  np.testing.assert_array_equal(
      logits(again.config, base, again.adapters),
      logits(deep, base, straight.adapters))
  assert straight.generate([[1, 2, 3]], max_new_tokens=3) == again.generate(
      [[1, 2, 3]], max_new_tokens=3)
  with pytest.raises(errors.UsageError, match="load the model again"):
    again.adapt(rank=2)


@pytest.mark.parametrize("fields, message", [
    ({"method": "ia3"}, "method=ia3 is not of LoRA's kind"),
    ({"init": "pissa"}, "init=pissa is made of each layer"),
    ({"modules_to_save": ("input_layernorm",)}, '"input_layernorm" is shared'),
])
def test_what_repetitions_cannot_share(fields, message):
  _, deep, base, _ = parts()
  block = dataclasses.replace(BLOCK, **fields)
  with pytest.raises(errors.UsageError, match=message):
    adapters_lib.build(
        jax.random.key(0), block, base, modules.paths(deep),
        order=deep.layer_order)


def test_a_norm_is_trained_whole_beside_repetitions():
  _, deep, base, _ = parts()
  block = dataclasses.replace(BLOCK, modules_to_save=("norm",))
  _, tree = adapters_lib.build(
      jax.random.key(0), block, base, modules.paths(deep),
      order=deep.layer_order)
  moved = tiny.mask(contract.moved(tree, 0.2))
  assert tiny.distance(
      logits(deep, base, moved), logits(*copied(deep, base), moved)) < 1e-6
