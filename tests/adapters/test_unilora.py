"""Uni-LoRA: its projection, and folders whose config alone names modules."""

from __future__ import annotations

import dataclasses
import warnings

import jax
import numpy as np
import pytest
import safetensors.numpy

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax.adapters import partition
from lora_jax.adapters import unilora
from lora_jax.export import peft as peft_export
from lora_jax.models import modules
from tests import tiny
from tests.adapters import with_peft

CONFIG = adapters_lib.AdapterConfig(
    method="unilora", rank=4, targets=("q_proj", "down_proj"),
    options=unilora.Options(
        theta_d_length=50, proj_seed=7, init_theta_d_bound=1.0))
SAVED = dataclasses.replace(CONFIG, options=dataclasses.replace(
    CONFIG.options, save_indices=True))


def test_the_equation_by_hand():
  adapter = unilora.UniLoRA(
      rate=np.float32(0), rank=np.int32(1), turn=np.int32(1), target="q",
  ).bound(unilora.Vector(
      theta=np.float32([8, 6, 5]), root=np.float32([0.25, 0.5, 1]),
      down={"q": np.int32([[[2], [2]], [[0], [1]]])},
      up={"q": np.int32([[[0, 0, 0]], [[1, 2, 0]]])}))
  x, w = np.float32([[1, 2]]), np.ones((2, 3), np.float32)
  # A = (8/4, 6/2)', so that x A = 8; B = (3, 5, 2).
  np.testing.assert_array_equal(adapter.apply(x, w), [[27, 43, 19]])
  np.testing.assert_array_equal(
      adapter.merge(w), [[7, 11, 5], [10, 16, 7]])


@pytest.mark.parametrize("count, length, seed", [
    (100, 7, 0), (100, 10, 3), (5, 7, 42), (300_001, 256, 42)])
def test_indices_are_those_peft_draws(count, length, seed):
  model = pytest.importorskip("peft.tuners.unilora.model")
  np.testing.assert_array_equal(
      unilora.draw(count, length, seed),
      model.UniLoraModel.generate_index(count, length, seed))


def test_the_projection_is_an_isometry():
  """Whatever theta is, all A and B are together as long as it."""
  tree = with_peft.build(CONFIG)
  theta = np.asarray(tree.shared.theta)
  total = 0.0
  for target in ("q_proj", "down_proj"):
    for layer in range(3):
      total += sum((np.asarray(x, np.float64)**2).sum() for x in
                   partition.module(tree, target, layer).factors())
  np.testing.assert_allclose(total, (theta.astype(np.float64)**2).sum(),
                             rtol=1e-6)
  trainable, _ = adapters_lib.split(tree)
  assert [x.shape for x in jax.tree.leaves(trainable)] == [(50,)]
  assert partition.trainable_size(tree) == 50


FIELDS = [
    {}, {"init_weights": False}, {"save_indices": True},
    # More of theta than there are entries: some are not used.
    {"save_indices": True, "theta_d_length": 4000}]


# Every field, with and without layers in turn; the others are like them.
@pytest.mark.parametrize("fields, layers", [
    pytest.param(x, layers, marks=() if i % 2 == bool(layers) else
                 pytest.mark.slow, id=f"{x}-{layers}")
    for i, x in enumerate(FIELDS) for layers in (None, "0,2")])
def test_folders_are_read_and_written(fields, layers, tmp_path):
  config = dataclasses.replace(CONFIG, layers=layers, options=(
      dataclasses.replace(CONFIG.options, **fields)))
  loaded, tensors = with_peft.check(config, tmp_path)
  assert loaded.config.options == config.options
  count = 4 if layers else 6
  assert len(loaded.config.targets) == count
  assert len(tensors) == 1 + 4 * count * config.options.save_indices
  kinds = {name.split(".")[-1].split("_")[1]: x.dtype
           for name, x in tensors.items()}
  assert kinds.get("indices", "int64") == "int64"


@pytest.mark.parametrize("fields", [
    {"target_modules": r".*\.(0|2)\.(self_attn\.k|mlp\.up)_proj"},
    {"target_modules": "all-linear"},
    {"target_modules": ["self_attn.q_proj", "lm_head"],
     "layers_to_transform": [1]},
    {"target_modules": ["v_proj", "gate_proj"], "layers_to_transform": 2},
], ids=str)
def test_the_config_alone_says_what_is_adapted(fields, tmp_path):
  peft = pytest.importorskip("peft")
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    model = peft.get_peft_model(with_peft.torch_model(), peft.UniLoraConfig(
        r=3, theta_d_length=20, init_theta_d_bound=2.0, **fields)).eval()
    model.save_pretrained(tmp_path / "a")
  expected = tiny.torch_logits(model, with_peft.TOKENS)
  assert tiny.distance(with_peft.logits(None), expected) > 1e-3
  loaded = with_peft.read(tmp_path / "a")
  assert tiny.distance(with_peft.logits(loaded.adapters), expected) <= 2e-5


def test_fused_modules_are_refused(tmp_path):
  """Of a model that has one gate_up_proj where there are two here."""
  fused = {f"model.layers.{i}.mlp.gate_up_proj": {
      f"model.layers.{i}.mlp.{part}_proj": 48 for part in ("gate", "up")}
           for i in range(3)}
  paths = with_peft.PATHS

  def read(targets):
    config = dataclasses.replace(CONFIG, targets=targets)
    tree = with_peft.build(config)
    text = peft_export.peft_config(config, tree, paths)
    peft_export.write(tmp_path / "a", tree, text, paths)
    return tree, text, peft_export.read(
        tmp_path / "a", paths, modules.shapes(with_peft.CONFIG), fused=fused)

  tree, text, loaded = read(("q_proj",))
  peft_export.write(tmp_path / "b", loaded.adapters, text, paths, fused=fused)
  with pytest.raises(errors.UserError, match="gate_up_proj only"):
    read(("q_proj", "up_proj"))
  config = dataclasses.replace(CONFIG, targets=("up_proj",))
  tree = with_peft.build(config)
  text = peft_export.peft_config(config, tree, paths)
  with pytest.raises(errors.UserError, match="up_proj: PEFT has this method"):
    peft_export.write(tmp_path / "c", tree, text, paths, fused=fused)


@pytest.mark.parametrize("name, change, match", [
    ("base_model.unilora_theta_d", None, "unilora_theta_d is missing"),
    ("base_model.unilora_theta_d", lambda x: x[:9], "theta_d_length is 50"),
    ("unilora_indices_B", lambda x: x + 50, "theta has 50 entries"),
    ("unilora_scales_A", lambda x: x + np.arange(x.size).reshape(x.shape),
     "differ"),
    ("unilora_indices_A", None, "unilora_indices_A")])
def test_damaged_folders_are_refused(name, change, match, tmp_path):
  with_peft.write(tmp_path / "a", SAVED, with_peft.build(SAVED))
  tensors = with_peft.tensors(tmp_path / "a")
  place = next(key for key in sorted(tensors) if name in key)
  if change is None:
    del tensors[place]
  else:
    tensors[place] = change(tensors[place])
  safetensors.numpy.save_file(tensors, tmp_path / "a" / peft_export.WEIGHTS)
  with pytest.raises(errors.UserError, match=match):
    with_peft.read(tmp_path / "a")


def test_names_of_another_model_are_refused(tmp_path):
  with_peft.write(tmp_path / "a", CONFIG, with_peft.build(CONFIG))
  place = tmp_path / "a" / peft_export.CONFIG
  place.write_text(place.read_text().replace('"q_proj"', '"query"'))
  with pytest.raises(errors.UserError, match='"query" matches no module'):
    with_peft.read(tmp_path / "a")
  place.write_text(place.read_text().replace('"query"', '"layers.9.q_proj"'))
  with pytest.raises(errors.UserError, match="matches no module"):
    with_peft.read(tmp_path / "a")


@pytest.mark.parametrize("fields", [
    {"theta_d_length": 0}, {"init_theta_d_bound": 0.0}, {"proj_seed": -1}],
    ids=str)
def test_options_out_of_range_are_refused(fields):
  with pytest.raises(errors.UsageError, match=next(iter(fields))):
    with_peft.build(dataclasses.replace(CONFIG, options=fields))
