"""Adapters whose start looked at rows: folders, PEFT, training, resuming."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import safetensors

from lora_jax import adapters as adapters_lib
from lora_jax import api
from lora_jax import errors
from lora_jax import quant
from lora_jax.adapters import runs
from lora_jax.data import dataset
from lora_jax.data import formats
from lora_jax.data import templates
from lora_jax.export import peft as peft_export
from lora_jax.models import init
from tests import tiny
from tests.experiments import conftest
from tests.export import test_starts as plain

NF4 = quant.QuantSpec(block_size=16)
BLOCK = dict(
    rank=4, alpha=8.0, targets="q_proj,down_proj,lm_head", init_batches=2,
    rank_pattern={"layers.1.mlp.down_proj": 2}, alpha_pattern={"q_proj": 4.0})
ROWS = [formats.Example(text=text, source="x")
        for text in ("abcdefgh", "the cat sat", "xyz", "ten green bottles")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return conftest.write_model(
      tmp_path_factory.mktemp("informed") / "model", plain.CONFIG)


@pytest.fixture(scope="module")
def models(folder):
  return {"none": api.load(str(folder)),
          "nf4": api.load(str(folder), quant=NF4)}


@pytest.fixture(scope="module")
def rows(models):
  return models["none"].encode(ROWS, max_length=24)


@pytest.fixture(scope="module")
def adapted(models, rows):
  """`(start, method, fmt)` -> a model; each is made once."""
  made = {}

  def get(start, method="lora", fmt="none"):
    key = start, method, fmt
    if key not in made:
      made[key] = models[fmt].adapt(
          rows=rows, batch_size=2, init=start, method=method, **BLOCK)
    return made[key]

  return get


@pytest.mark.parametrize("start", ["corda", "lora_ga", "eva"])
def test_it_is_the_identity_on_an_unquantised_base(start, models, adapted):
  model = adapted(start)
  assert tiny.distance(
      plain.logits(model), plain.logits(models["none"])) < 2e-5
  moved = tiny.distance(*(m.base.layers["q_proj"].weight
                          for m in (model, models["none"])))
  assert (moved == 0) == (start == "eva") == (model.replaced is None)


# Every start, and every format; each is a pass over rows with gradients.
@pytest.mark.parametrize("start, method, fmt", [
    ("corda", "lora", "none"), ("lora_ga", "dora", "none"),
    ("corda", "rslora", "nf4"),
    pytest.param("lora_ga", "lora", "nf4", marks=pytest.mark.slow),
    ("eva", "dora", "nf4"),
    pytest.param("eva", "rslora", "none", marks=pytest.mark.slow)])
def test_a_folder_gives_the_model_back(
    start, method, fmt, models, adapted, tmp_path):
  model = plain.trained(adapted(start, method, fmt))
  model.save(tmp_path / "a")
  read = models[fmt].with_adapter(tmp_path / "a")
  assert read.replaced == model.replaced
  np.testing.assert_array_equal(plain.logits(read), plain.logits(model))
  read.save(tmp_path / "b")
  for name in (peft_export.CONFIG, peft_export.WEIGHTS):
    assert ((tmp_path / "a" / name).read_bytes()
            == (tmp_path / "b" / name).read_bytes())


@pytest.mark.parametrize("start, method", [
    pytest.param("corda", "rslora", marks=pytest.mark.slow),
    ("corda", "lora"), ("lora_ga", "dora"),
    pytest.param("lora_ga", "lora", marks=pytest.mark.slow),
    ("eva", "lora")])
def test_peft_reads_the_folder(
    start, method, models, adapted, folder, tmp_path):
  """As an ordinary adapter of the original base; what PEFT writes again is no
  more than that."""
  peft = pytest.importorskip("peft")

  model = plain.trained(adapted(start, method))
  expected = plain.logits(model)
  model.save(tmp_path / "a")
  loaded = peft.PeftModel.from_pretrained(
      plain.torch_model(folder), tmp_path / "a")
  assert tiny.distance(
      tiny.torch_logits(loaded.eval(), plain.TOKENS), expected) < 2e-5
  loaded.save_pretrained(tmp_path / "b")
  read = models["none"].with_adapter(tmp_path / "b")
  assert read.replaced is None
  assert tiny.distance(plain.logits(read), expected) < 2e-5


def test_a_difference_is_an_ordinary_adapter(models, adapted, tmp_path):
  model = plain.trained(adapted("corda"))
  model.save(tmp_path / "a", difference=True)
  with safetensors.safe_open(
      tmp_path / "a" / peft_export.WEIGHTS, framework="np") as file:
    assert not {"lora_jax.began", "lora_jax.replaced"} & set(file.metadata())
  read = models["none"].with_adapter(tmp_path / "a")
  assert read.replaced is None and read.adapter_config.rank == 8
  assert tiny.distance(plain.logits(read), plain.logits(model)) < 2e-5


def test_fused_modules_and_embeddings(tmp_path):
  """PEFT has one adapter of qkv_proj where ours are three."""
  peft = pytest.importorskip("peft")

  config = tiny.CONFIGS["phi3"]
  base = init.random_base(jax.random.key(0), config)
  whole = api.Model(config=config, base=base, tokenizer=None,
                    fingerprint="f", source="phi3")
  rng = np.random.default_rng(0)
  rows = dataset.of([templates.Encoded(
      tokens=rng.integers(0, 61, 12).astype(np.int32),
      weights=np.ones(12, np.float32)) for _ in range(4)])
  block = dict(rows=rows, init="lora_ga", rank=4, rank_pattern={"k_proj": 2},
               targets="q_proj,k_proj,v_proj,down_proj,embed_tokens")
  with pytest.raises(errors.UserError, match="qkv_proj: alpha / r differs"):
    whole.adapt(**block).save(tmp_path / "a")
  model = plain.trained(whole.adapt(alpha_pattern={"k_proj": 16.0}, **block))
  model.save(tmp_path / "a")
  read = whole.with_adapter(tmp_path / "a")
  assert read.replaced == model.replaced
  jax.tree.map(np.testing.assert_array_equal, read.base, model.base)
  jax.tree.map(np.testing.assert_array_equal, *(
      dataclasses.replace(m.adapters, layers={
          name: (a.a, a.b, a.a0, a.b0, a.scale)
          for name, a in m.adapters.layers.items()})
      for m in (read, model)))
  loaded = peft.PeftModel.from_pretrained(
      tiny.to_torch(config, base, tmp_path / "m"), tmp_path / "a")
  tokens = rows[0].tokens[None]
  positions = np.arange(12, dtype=np.int32)[None]
  assert tiny.distance(
      tiny.torch_logits(loaded.eval(), tokens), tiny.logits(
          config, model.base, tokens, positions, np.ones_like(tokens),
          model.adapters)) < 2e-5


def test_evas_folder_says_which_ranks_there_are(adapted, tmp_path):
  model = adapted("eva")
  model.save(tmp_path / "a")
  config = json.loads((tmp_path / "a" / peft_export.CONFIG).read_text())
  assert config["init_lora_weights"] == "eva"
  ranks = {path: int(rank) for name in ("q_proj", "down_proj")
           for path, rank in zip(
               model.paths[name], model.adapters.layers[name].rank)}
  ranks["lm_head"] = int(model.adapters.outer["lm_head"].rank)
  assert sum(ranks.values()) == 4 + 4 + 4 + 2 + 4
  assert config["rank_pattern"] == {
      path: rank for path, rank in ranks.items() if rank not in (0, 4)}


@pytest.mark.parametrize("start", ["corda", "lora_ga"])
def test_an_unconverted_folder_of_peft_is_refused(start, models, tmp_path):
  models["none"].adapt(rank=4, targets="q_proj").save(tmp_path / "a")
  place = tmp_path / "a" / peft_export.CONFIG
  config = json.loads(place.read_text()) | {"init_lora_weights": start}
  place.write_text(json.dumps(config))
  with pytest.raises(errors.UserError, match=(
      f"'{start}' changed the base.*path_initial_model_for_weight_conversion")):
    models["none"].with_adapter(tmp_path / "a")


def test_a_folder_of_another_base_is_refused(models, adapted, tmp_path):
  adapted("corda", fmt="nf4").save(tmp_path / "a")
  with pytest.raises(errors.UserError, match=r"digest.*use the quant block"):
    models["none"].with_adapter(tmp_path / "a")


@pytest.mark.parametrize("start", ["lora_ga", "eva"])
def test_layers_that_are_cut_into_runs(start, models, rows, tmp_path):
  """One that is not adapted, and one that is, are two stacks."""
  model = plain.trained(models["none"].adapt(
      rows=rows, batch_size=2, init=start, layers="1",
      **BLOCK | {"rank_pattern": {"down_proj": 2}}))
  assert any(isinstance(one, runs.Runs)
             for one in model.adapters.layers.values())
  model.save(tmp_path / "a")
  read = models["none"].with_adapter(tmp_path / "a")
  assert read.replaced == model.replaced
  np.testing.assert_array_equal(plain.logits(read), plain.logits(model))
  assert tiny.distance(plain.logits(read), plain.logits(models["none"])) > 0.01


def test_ranks_that_eva_spreads_widely_are_cut_into_runs():
  """(A, B) of a stack as wide as its largest rank, for runs that are not."""
  config = dataclasses.replace(plain.CONFIG, n_layers=3)
  block = adapters_lib.AdapterConfig(
      init="eva", targets="q_proj", rank=1, rank_pattern={
          "layers.2.self_attn.q_proj": 12})
  a = np.random.default_rng(0).normal(size=(3, 32, 12)).astype(np.float32)
  a[:2, :, 1:] = 0
  _, tree = adapters_lib.build(
      jax.random.key(0), block, init.random_base(jax.random.key(0), config),
      tiny.paths(config),
      stats={"q_proj": (a, np.zeros((3, 12, 32), np.float32))})
  narrow, wide = tree.layers["q_proj"].stacks
  np.testing.assert_array_equal(narrow.a, a[:2, :, :1])
  np.testing.assert_array_equal(wide.a, a[2:])
  assert narrow.b.shape == (2, 1, 32)


def test_the_first_of_several_methods_may_look_at_rows(models, rows, tmp_path):
  first = adapters_lib.AdapterConfig(init="corda", **BLOCK)
  other = adapters_lib.AdapterConfig(method="houlsby", rank=2)
  model = models["none"].adapt([first, other], rows=rows, batch_size=2)
  alone = models["none"].adapt(first, rows=rows, batch_size=2)
  assert model.replaced == alone.replaced is not None
  model.save(tmp_path / "a")
  read = models["none"].with_adapter(tmp_path / "a")
  assert read.replaced == model.replaced
  np.testing.assert_array_equal(plain.logits(read), plain.logits(model))
  with pytest.raises(errors.UsageError, match="only the first of several"):
    models["none"].adapt([other, first], rows=rows)


def test_rows_are_asked_for(models):
  for start in ("eva", "corda", "lora_ga"):
    with pytest.raises(errors.UsageError, match=f"init={start} looks at"):
      models["none"].adapt(init=start)


@pytest.mark.parametrize("start, method, fmt", [
    ("lora_ga", "lora", "nf4"),
    # Three runs, of which the base is as it was.
    pytest.param("eva", "rslora", "none", marks=pytest.mark.slow)])
def test_a_run_that_goes_on_ends_as_one_that_did_not_stop(
    start, method, fmt, models, rows, adapted, tmp_path):
  model = adapted(start, method, fmt)
  optim = api.OptimConfig(schedule="constant", warmup=0)

  def train(model, steps, folder):
    return model.train(
        rows, workdir=folder, optim=optim, packing=False,
        config=api.TrainConfig(steps=steps, batch_size=2))[0]

  whole = train(model, 4, tmp_path / "whole")
  model.save(tmp_path / "start")
  train(model, 2, tmp_path / "half")
  shutil.copytree(tmp_path / "half", tmp_path / "other")
  read = models[fmt].with_adapter(tmp_path / "start")
  ended = train(read, 4, tmp_path / "half")
  np.testing.assert_array_equal(plain.logits(ended), plain.logits(whole))

  def losses(folder):
    return [x["loss"] for x in conftest.metrics(folder)]

  assert len(losses(tmp_path / "whole")) == 4
  assert losses(tmp_path / "half") == losses(tmp_path / "whole")
  # It did learn, and what was learnt is in the folder.
  assert tiny.distance(plain.logits(ended), plain.logits(model)) > 1e-3
  ended.save(tmp_path / "a")
  np.testing.assert_array_equal(
      plain.logits(models[fmt].with_adapter(tmp_path / "a")),
      plain.logits(whole))
  if start == "lora_ga":
    other = models[fmt].adapt(
        rows=rows.select([2, 3]), batch_size=2, init=start, method=method,
        **BLOCK)
    with pytest.raises(errors.UserError, match=r"same adapter\.init"):
      train(other, 4, tmp_path / "other")
