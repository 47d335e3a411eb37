"""Modules and tokens' rows that are trained whole: against PEFT, both ways."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import api
from lora_jax import errors
from lora_jax import quant
from lora_jax.export import peft as peft_export
from tests import tiny
from tests.experiments import conftest

CONFIGS = {tied: conftest.model_config(
    n_layers=2, qkv_bias=False, tie_embeddings=tied) for tied in (False, True)}
TOKENS = np.random.default_rng(0).integers(0, 250, (2, 12)).astype(np.int32)
TOKENS[:, ::3] = 7
BLOCK = adapters_lib.AdapterConfig(rank=2, alpha=4.0, targets="q_proj")
ROWS = (201, 7, 66)
# tied, our fields, PEFT's.
CASES = {
    "head and norms": (
        False, dict(modules_to_save=("lm_head", "norm", "input_layernorm")),
        dict(modules_to_save=["lm_head", "model.norm", "input_layernorm"])),
    "projection": (
        False, dict(modules_to_save=("up_proj",)),
        dict(modules_to_save=["up_proj"])),
    "tied embedding": (
        True, dict(modules_to_save=("embed_tokens",)),
        dict(modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    "rows": (
        False, dict(trainable_token_indices=ROWS),
        dict(trainable_token_indices={
            "embed_tokens": list(ROWS), "lm_head": list(ROWS)})),
    "tied rows": (
        True, dict(trainable_token_indices=ROWS),
        dict(trainable_token_indices=list(ROWS))),
    "rows and a norm": (
        False, dict(trainable_token_indices=ROWS,
                    modules_to_save=("lm_head", "norm")),
        dict(trainable_token_indices=list(ROWS),
             modules_to_save=["lm_head", "model.norm"])),
}
each = pytest.mark.parametrize("case", CASES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  root = tmp_path_factory.mktemp("whole")
  return {tied: conftest.write_model(root / str(tied), config)
          for tied, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def models(folders):
  return {tied: api.load(str(folder)) for tied, folder in folders.items()}


def logits(model):
  positions = np.broadcast_to(np.arange(12, dtype=np.int32), (2, 12))
  return tiny.logits(model.config, model.base, TOKENS, positions,
                     np.ones_like(TOKENS), model.adapters)


def block(fields):
  return dataclasses.replace(BLOCK, **fields)


def trained(model):
  params, frozen = adapters_lib.split(model.adapters)
  leaves, structure = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(5), len(leaves))
  moved = [x + 0.2 * jax.random.normal(k, x.shape)
           for k, x in zip(keys, leaves)]
  return dataclasses.replace(model, adapters=adapters_lib.join(
      structure.unflatten(moved), frozen))


def torch_model(folder):
  transformers = pytest.importorskip("transformers")
  return transformers.AutoModelForCausalLM.from_pretrained(
      folder, attn_implementation="eager", dtype="float32")


@each
def test_peft_loads_ours_and_we_do(case, models, folders, tmp_path):
  peft = pytest.importorskip("peft")

  tied, fields, _ = CASES[case]
  model = trained(models[tied].adapt(block(fields)))
  model.save(tmp_path / "a")
  loaded = peft.PeftModel.from_pretrained(
      torch_model(folders[tied]), tmp_path / "a")
  ours = logits(model)
  assert tiny.distance(ours, tiny.torch_logits(loaded, TOKENS)) < 2e-5
  read = models[tied].with_adapter(tmp_path / "a", dropout=0.0)
  np.testing.assert_array_equal(logits(read), ours)
  read.save(tmp_path / "b")
  for name in (peft_export.CONFIG, peft_export.WEIGHTS):
    a, b = ((tmp_path / x / name).read_bytes() for x in "ab")
    assert json.loads(a) == json.loads(b) if name.endswith("json") else a == b


@each
def test_we_load_pefts(case, models, folders, tmp_path):
  torch = pytest.importorskip("torch")
  peft = pytest.importorskip("peft")

  tied, fields, options = CASES[case]
  torch.manual_seed(0)
  model = peft.get_peft_model(torch_model(folders[tied]), peft.LoraConfig(
      r=2, lora_alpha=4, target_modules=["q_proj"], task_type="CAUSAL_LM",
      init_lora_weights=False, **options))
  trains = 0
  with torch.no_grad():
    for value in model.parameters():
      if value.requires_grad:
        value += 0.2 * torch.randn_like(value)
        trains += value.numel()
  model.save_pretrained(tmp_path / "a")
  read = models[tied].with_adapter(tmp_path / "a")
  assert tiny.distance(
      logits(read), tiny.torch_logits(model.eval(), TOKENS)) < 2e-5
  # As many parameters are trained, and nothing moves before the first step.
  fresh = models[tied].adapt(block(fields))
  assert adapters_lib.trainable_size(fresh.adapters) == trains
  assert adapters_lib.trainable_size(read.adapters) == trains
  assert tiny.distance(logits(fresh), logits(models[tied])) < 2e-6


@functools.partial(jax.jit, static_argnums=0)
def _gradient(config, params, frozen, base):
  def loss(params):
    positions = jnp.broadcast_to(jnp.arange(11), (2, 11))
    out = tiny.logits(config, base, TOKENS[:, :-1], positions,
                      np.ones((2, 11), np.int32),
                      adapters_lib.join(params, frozen))
    chosen = jnp.take_along_axis(
        jax.nn.log_softmax(out), TOKENS[:, 1:, None], -1)
    return -chosen.mean()

  return jax.grad(loss)(params)


@pytest.mark.parametrize("case", ["head and norms", "tied rows"])
def test_gradients_are_those_of_peft(case, models, folders, tmp_path):
  torch = pytest.importorskip("torch")
  peft = pytest.importorskip("peft")

  tied, fields, _ = CASES[case]
  model = trained(models[tied].adapt(block(fields)))
  model.save(tmp_path / "a")
  loaded = peft.PeftModel.from_pretrained(
      torch_model(folders[tied]), tmp_path / "a", is_trainable=True)
  tokens = torch.from_numpy(TOKENS.astype(np.int64))
  loaded(tokens, labels=tokens).loss.backward()
  params, frozen = adapters_lib.split(model.adapters)
  grads = _gradient(model.config, params, frozen, model.base)
  ours = peft_export.tensors(adapters_lib.join(grads, frozen), model.paths)
  theirs = {
      name.replace(".modules_to_save", "").replace(".default", ""): p.grad
      for name, p in loaded.named_parameters() if p.requires_grad}
  assert ours.keys() == theirs.keys()
  for name, gradient in theirs.items():
    assert tiny.distance(ours[name], gradient.numpy()) < 2e-5, name


@pytest.mark.parametrize("case", ["projection", "tied rows", "rows"])
def test_the_merged_model_is_the_same(case, models, tmp_path):
  tied, fields, _ = CASES[case]
  model = trained(models[tied].adapt(block(fields)))
  model.save_merged(tmp_path / "m")
  merged = api.load(str(tmp_path / "m"))
  assert merged.config.tie_embeddings == tied
  assert tiny.distance(logits(merged), logits(model)) < 2e-5


def test_a_quantised_module_is_dequantised_to_be_trained(folders):
  model = api.load(str(folders[False]), quant=quant.QuantSpec(block_size=8))
  adapted = model.adapt(block(dict(modules_to_save=("up_proj",))))
  weight = adapted.adapters.overrides.layers["up_proj"].weight
  assert weight.dtype == jnp.float32
  np.testing.assert_array_equal(
      weight, model.base.layers["up_proj"].weight.dequantize())
  assert tiny.distance(logits(adapted), logits(model)) < 1e-6


@pytest.mark.parametrize("tied, fields, message", [
    (False, dict(modules_to_save=("lm_haed",)), 'did you mean "lm_head"'),
    (False, dict(modules_to_save=("q_proj",)), '"q_proj" is adapted, too'),
    (True, dict(modules_to_save=("lm_head",)), "tied to embed_tokens"),
    (False, dict(trainable_token_indices=(1, 1)), "every token once"),
    (False, dict(trainable_token_indices=(258,)), "from 0 to 257"),
    (False, dict(trainable_token_indices=(1,), targets="embed_tokens"),
     "embed_tokens is trained otherwise"),
    (False, dict(trainable_token_indices=(1,),
                 modules_to_save=("embed_tokens",)), "trained otherwise"),
    (False, dict(method="full", modules_to_save=("norm",)), "makes none"),
    (False, dict(trainable_token_indices="new"), "model.add_tokens names none"),
])
def test_refused(tied, fields, message, models):
  with pytest.raises(errors.UsageError, match=message):
    models[tied].adapt(block(fields))


@pytest.mark.parametrize("change, message", [
    (dict(modules_to_save=["lm_head", "norm"]), "holds no tensor of lm_head"),
    (dict(trainable_token_indices=[1, 2]), "of 2 rows for embed_tokens"),
    (dict(ensure_weight_tying=False), "apart from the other"),
])
def test_refused_folders(change, message, models, tmp_path):
  tied = "ensure_weight_tying" in change
  fields = CASES["tied embedding" if tied else "rows"][1]
  models[tied].adapt(block(fields)).save(tmp_path / "a")
  folder = shutil.copytree(tmp_path / "a", tmp_path / "b")
  config = json.loads((folder / peft_export.CONFIG).read_text())
  (folder / peft_export.CONFIG).write_text(json.dumps(config | change))
  with pytest.raises(errors.UserError, match=message):
    models[tied].with_adapter(folder)
