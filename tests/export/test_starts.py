"""Adapters that started out of the base's weights: folders, PEFT, resuming."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import api
from lora_jax import errors
from lora_jax import quant
from lora_jax.data import formats
from lora_jax.export import peft as peft_export
from lora_jax.models import init
from tests import tiny
from tests.experiments import conftest

CONFIG = conftest.model_config(d_model=32, d_ff=64)
TOKENS = np.random.default_rng(0).integers(0, 250, (2, 16)).astype(np.int32)
BLOCK = adapters_lib.AdapterConfig(
    rank=4, alpha=8.0, targets="q_proj,down_proj,lm_head",
    rank_pattern={"layers.1.mlp.down_proj": 2}, alpha_pattern={"q_proj": 4.0})
NF4 = quant.QuantSpec(block_size=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return conftest.write_model(
      tmp_path_factory.mktemp("starts") / "model", CONFIG, change=graded)


def graded(base):
  """Weights whose leading singular values are apart.

  Where neighbours are close, what the leading ones span is rounding: it
  differs from one LAPACK to another, and PEFT has torch's.
  """
  def one(module):
    if not hasattr(module, "weight"):
      return module
    u, s, v = np.linalg.svd(
        np.asarray(module.weight, np.float64), full_matrices=False)
    s[..., :8] *= 1 + 0.25 * np.arange(8, 0, -1)
    return module.replace(weight=jnp.asarray(
        (u * s[..., None, :]) @ v, jnp.float32))

  return base.replace(layers={
      name: one(module) for name, module in base.layers.items()})


@pytest.fixture(scope="module")
def models(folder):
  return {"none": api.load(str(folder)),
          "nf4": api.load(str(folder), quant=NF4)}


def logits(model):
  positions = np.broadcast_to(np.arange(16, dtype=np.int32), (2, 16))
  return tiny.logits(model.config, model.base, TOKENS, positions,
                     np.ones_like(TOKENS), model.adapters)


def trained(model, scale=0.05):
  """As if steps had been done: every trained leaf moved."""
  params, frozen = adapters_lib.split(model.adapters)
  leaves, structure = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(5), len(leaves))
  moved = [x + scale * jax.random.normal(k, x.shape)
           for k, x in zip(keys, leaves)]
  tree = adapters_lib.join(structure.unflatten(moved), frozen)
  return dataclasses.replace(model, adapters=tiny.mask(tree))


def torch_model(folder):
  transformers = pytest.importorskip("transformers")
  return transformers.AutoModelForCausalLM.from_pretrained(
      folder, attn_implementation="eager", dtype="float32")


def block(init, method="lora", **fields):
  return dataclasses.replace(BLOCK, init=init, method=method, **fields)


@pytest.mark.parametrize("method", ["rslora", "dora"])
def test_pissa_is_the_identity_on_an_unquantised_base(method, models):
  adapted = models["none"].adapt(block("pissa", method))
  assert tiny.distance(logits(adapted), logits(models["none"])) < 2e-5
  # The weights did change, those of this model alone.
  old, new = (m.base.layers["q_proj"].weight for m in (models["none"], adapted))
  assert tiny.distance(new, old) > 0.1


@pytest.mark.parametrize("start, method", [
    ("pissa", "lora"), ("loftq", "dora")])
def test_a_quantised_base_comes_nearer_to_the_original(start, method, models):
  plain, original = logits(models["nf4"]), logits(models["none"])
  fields = dict(rank=16, rank_pattern={}, targets="all-linear")
  adapted = logits(models["nf4"].adapt(block(start, method, **fields)))
  assert tiny.distance(adapted, original) < 0.9 * tiny.distance(
      plain, original)


@pytest.mark.parametrize("method, fmt, start", [
    ("lora", "none", "pissa"), ("rslora", "nf4", "pissa_niter_2"),
    ("lora", "nf4", "olora"), ("dora", "none", "orthogonal"),
    ("dora", "nf4", "loftq")])
def test_a_folder_gives_the_model_back(method, fmt, start, models, tmp_path):
  if start == "loftq":
    fields = dict(targets="q_proj,down_proj", loftq_iterations=2)
  else:
    fields = {}
  model = trained(models[fmt].adapt(block(start, method, **fields)))
  model.save(tmp_path / "a")
  read = models[fmt].with_adapter(tmp_path / "a")
  assert read.replaced == model.replaced
  np.testing.assert_array_equal(logits(read), logits(model))
  read.save(tmp_path / "b")
  for name in (peft_export.CONFIG, peft_export.WEIGHTS):
    assert ((tmp_path / "a" / name).read_bytes()
            == (tmp_path / "b" / name).read_bytes())


def test_a_folder_of_another_base_is_refused(models, folder, tmp_path):
  models["nf4"].adapt(block("pissa")).save(tmp_path / "a")
  for other in (models["none"],
                api.load(str(folder), quant=dataclasses.replace(
                    NF4, block_size=8))):
    with pytest.raises(errors.UserError, match=r"digest.*use the quant block"):
      other.with_adapter(tmp_path / "a")


@pytest.mark.parametrize("method, start", [
    ("lora", "pissa"), ("rslora", "pissa"), ("dora", "pissa"),
    ("lora", "olora")])
def test_peft_reads_the_difference_on_the_original_base(
    method, start, models, folder, tmp_path):
  peft = pytest.importorskip("peft")

  model = trained(models["none"].adapt(block(start, method)))
  model.save(tmp_path / "a", difference=True)
  loaded = peft.PeftModel.from_pretrained(torch_model(folder), tmp_path / "a")
  assert tiny.distance(
      tiny.torch_logits(loaded, TOKENS), logits(model)) < 2e-5
  config = json.loads((tmp_path / "a" / peft_export.CONFIG).read_text())
  assert config["r"] == 8 and config["init_lora_weights"] is True
  # It is an ordinary adapter of the original base for us, too.
  read = models["none"].with_adapter(tmp_path / "a")
  assert read.replaced is None
  assert tiny.distance(logits(read), logits(model)) < 2e-5


def test_the_difference_of_a_quantised_run_is_off_by_the_residuals_error(
    models, tmp_path):
  """W + s(AB - A0 B0), where the run had q(W - s A0 B0) + s AB."""
  model = trained(models["nf4"].adapt(block(
      "loftq", targets="q_proj,down_proj")))
  model.save(tmp_path / "a", difference=True)
  read = models["none"].with_adapter(tmp_path / "a")
  for name in ("q_proj", "down_proj"):
    ours, theirs = model.adapters.layers[name], read.adapters.layers[name]
    old, new = (m.base.layers[name].weight for m in (models["none"], model))
    product = lambda s, a, b: s[:, None, None] * jnp.matmul(
        a, b, precision="highest")
    was = quant.dequantize(new) + product(ours.scale, ours.a, ours.b)
    now = old + product(theirs.scale, theirs.a, theirs.b)
    error = quant.dequantize(new) - (
        old - product(ours.scale, ours.a0, ours.b0))
    np.testing.assert_allclose(was - now, error, atol=2e-6)
    assert float(jnp.abs(error).max()) > 1e-3


@pytest.mark.parametrize("start, method", [
    ("pissa", "dora"), ("olora", "rslora"), ("orthogonal", "lora")])
def test_peft_reads_the_folder_as_it_is(
    start, method, models, folder, tmp_path):
  peft = pytest.importorskip("peft")

  model = trained(models["none"].adapt(block(start, method)))
  model.save(tmp_path / "a")
  loaded = peft.PeftModel.from_pretrained(torch_model(folder), tmp_path / "a")
  assert tiny.distance(
      tiny.torch_logits(loaded.eval(), TOKENS), logits(model)) < 2e-5


@pytest.mark.parametrize("start, tolerance", [
    ("pissa", 2e-5), ("pissa_niter_500", 1e-3), ("olora", 2e-5)])
def test_an_unconverted_folder_of_peft(
    start, tolerance, models, folder, tmp_path):
  torch = pytest.importorskip("torch")
  peft = pytest.importorskip("peft")

  torch.manual_seed(0)
  model = peft.get_peft_model(torch_model(folder), peft.LoraConfig(
      r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"],
      init_lora_weights=start))
  with torch.no_grad():
    for name, value in model.named_parameters():
      if "lora_" in name:
        value += 0.05 * torch.randn_like(value)
  model.save_pretrained(tmp_path / "a")
  loaded = peft.PeftModel.from_pretrained(torch_model(folder), tmp_path / "a")
  expected = tiny.torch_logits(loaded.eval(), TOKENS)
  read = models["none"].with_adapter(tmp_path / "a")
  assert read.replaced is not None
  assert tiny.distance(logits(read), expected) < tolerance
  assert tiny.distance(logits(models["none"]), expected) > 1e-2


def test_the_merged_model_is_exact(models, tmp_path):
  model = trained(models["nf4"].adapt(block(
      "loftq", targets="q_proj,down_proj")))
  model.save_merged(tmp_path / "m")
  assert tiny.distance(
      logits(api.load(str(tmp_path / "m"))), logits(model)) < 2e-5


def test_donating_gives_the_same(models, folder):
  kept = models["nf4"].adapt(block("pissa"))
  given = api.load(str(folder), quant=NF4)
  weight = given.base.layers["q_proj"].weight.codes
  adapted = given.adapt(block("pissa"), donate=True)
  assert weight.is_deleted()
  assert adapted.replaced == kept.replaced


def test_a_checkpoint_is_refused_beside_another_base(models, tmp_path):
  rows = models["nf4"].encode(
      [formats.Example(text="abcdefgh", source="x")] * 2, max_length=16)
  config = api.TrainConfig(steps=1, batch_size=1)

  def train(scale):
    model = models["nf4"].adapt(block("pissa", alpha=scale))
    return model.train(rows, workdir=tmp_path, config=config)[0]

  digest = train(8.0).replaced
  assert train(8.0).replaced == digest  # Made again, and the same.
  with pytest.raises(errors.UserError, match=f"digest {digest[:12]}.*same"):
    train(16.0)


def test_refusals(models):
  with pytest.raises(errors.UsageError, match='"lm_head" is not quantised'):
    models["nf4"].adapt(block("loftq"))
  with pytest.raises(errors.UsageError, match="load the model again"):
    models["none"].adapt(block("pissa")).adapt(block("default"))
  with pytest.raises(errors.UsageError, match="original weights are not"):
    adapters_lib.build(
        jax.random.key(0), block("pissa"), models["nf4"].base,
        models["nf4"].paths)
  tied = dataclasses.replace(CONFIG, tie_embeddings=True)
  base = init.random_base(jax.random.key(0), tied)
  with pytest.raises(errors.UsageError, match="adapt embed_tokens instead"):
    adapters_lib.build(
        jax.random.key(0), block("pissa"), base, tiny.paths(tied))
