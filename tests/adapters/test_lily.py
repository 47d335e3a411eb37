"""Lily by hand, its sharing, and PEFT's files of it."""

from __future__ import annotations

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax.adapters import lily
from lora_jax.adapters import partition
from lora_jax.api import settings
from lora_jax.export import peft as peft_export
from lora_jax.train import memory
from tests import tiny
from tests.adapters import contract
from tests.adapters import with_peft

I, O, K, R = 5, 4, 3, 2


def block(targets="q_proj,down_proj", layers="", rank=4, **options):
  return adapters_lib.AdapterConfig(
      method="lily", rank=rank, targets=targets, layers=layers,
      options={"stride_A": 2, "num_B": K, "scaling": 1.5} | options)


def test_one_product_for_all_tokens_by_hand():
  rng = np.random.default_rng(0)
  a, b, router, w, x = (
      rng.standard_normal(shape) for shape in (
          (2, I, R), (K, R, O), (R, K), (I, O), (2, 3, I)))
  pool = lily.Pool(a=jnp.float32(a), b=jnp.float32(b))

  def one(turn, rank=R):
    return lily.Lily(
        router=jnp.float32(router), scale=jnp.float32(1.5),
        rank=jnp.int32(rank), turn=jnp.int32(turn), stride=2,
        target="up_proj").bound({"up_proj": pool})

  found = {}
  for turn, group in ((0, 0), (1, 0), (2, 1)):
    p = np.zeros(K)
    for token in x.reshape(-1, I):
      e = np.exp(token @ a[group] @ router)
      p += e / e.sum() / 6
    expected = x @ w + 1.5 * (x @ a[group]) @ sum(
        weight * matrix for weight, matrix in zip(p, b))
    found[turn] = one(turn).apply(jnp.float32(x), jnp.float32(w))
    np.testing.assert_allclose(found[turn], expected, rtol=1e-4, atol=1e-5)
  assert tiny.distance(found[0], found[2]) > 0.1
  # A row alone has other weights than with another row beside it.
  alone = one(0).apply(jnp.float32(x[:1]), jnp.float32(w))
  assert tiny.distance(alone, found[0][:1]) > 1e-2
  np.testing.assert_array_equal(
      one(0, rank=0).apply(jnp.float32(x), jnp.float32(w)),
      jnp.float32(x) @ jnp.float32(w))


def test_what_layers_share_and_where_it_starts():
  _, tree = adapters_lib.build(
      jax.random.key(0), block(rank=8), contract.quantised("none"),
      tiny.paths(contract.CONFIG), geometry=contract.GEOMETRY)
  assert tree.shared["q_proj"].a.shape == (2, 32, 8)  # Of layers 0, 1 and 2.
  assert tree.shared["down_proj"].b.shape == (K, 8, 32)
  assert not np.any(tree.shared["q_proj"].b)
  for value, bound in ((tree.shared["q_proj"].a, 32 ** -0.5),
                       (tree.layers["q_proj"].router, 8 ** -0.5)):
    assert 0.9 * bound < np.abs(value).max() <= bound
  assert adapters_lib.trainable_size(tree) == (
      2 * 3 * 8 * K + 8 * (2 * 32 + K * 32) + 8 * (2 * 48 + K * 32))
  # What is trained together has the gradient of both.
  tree = contract.moved(tree)
  trainable, frozen = adapters_lib.split(tree)
  _, grads = contract.gradient(
      trainable, frozen, contract.quantised("none"),
      contract.stacked(contract.batch()), jax.random.key(0))
  assert (np.abs(grads.shared["q_proj"].a).max((1, 2)) > 0).all()
  one, other = (partition.module(tree, "q_proj", n) for n in (0, 1))
  np.testing.assert_array_equal(one.a, other.a)
  assert np.any(one.a != partition.module(tree, "q_proj", 2).a)


@pytest.mark.parametrize("fields", [
    {}, {"stride_A": 1, "num_B": 2, "targets": "k_proj"},
    {"layers": "0,2"}, {"layers": "1-2", "stride_A": 4}])
def test_it_is_peft_s_and_shares_there(fields, tmp_path):
  config = block(**fields)
  loaded, tensors = with_peft.check(config, tmp_path)
  again = with_peft.build(config)
  assert jax.tree.map(jnp.shape, loaded.adapters.shared) == jax.tree.map(
      jnp.shape, again.shared)
  path = "base_model.model.model.layers.{}.self_attn.{}_proj.lily_{}.weight"
  layers = [0, 1, 2]
  config = json.loads((tmp_path / "ours" / peft_export.CONFIG).read_text())
  if "layers" in fields:
    layers = [0, 2] if fields["layers"] == "0,2" else [1, 2]
    assert config["layers_to_transform"] == layers
  assert config["target_modules"] == sorted(
      fields.get("targets", "q_proj,down_proj").split(","))
  name = "k" if "targets" in fields else "q"
  a, b = ([tensors[path.format(n, name, kind)] for n in layers]
          for kind in "AB")
  # PEFT moved what it shares, and moved it once.
  np.testing.assert_array_equal(b[0], b[1])
  assert (a[0] == a[1]).all() == (fields.get("stride_A", 2) > 1)
  if len(layers) == 3:
    assert np.any(a[1] != a[2])


def test_files_that_share_otherwise_are_refused(tmp_path):
  config = block()
  with_peft.write(tmp_path / "a", config, with_peft.build(config))
  place = tmp_path / "a" / peft_export.CONFIG
  text = json.loads(place.read_text())
  place.write_text(json.dumps(text | {"target_modules": ".*_proj"}))
  with pytest.raises(errors.UserError, match="a list of names"):
    with_peft.read(tmp_path / "a")
  place.write_text(json.dumps(text))
  tensors = with_peft.tensors(tmp_path / "a")
  name = "base_model.model.model.layers.1.self_attn.q_proj.lily_A.weight"
  for value, message in (
      (tensors[name] + 1, "of q_proj 1 .* stride_A=2"),
      (tensors[name][:, 1:], r"has shape \(4, 31\), this model needs")):
    safetensors.numpy.save_file(
        tensors | {name: np.ascontiguousarray(value)},
        tmp_path / "a" / peft_export.WEIGHTS)
    with pytest.raises(errors.UserError, match=message):
      with_peft.read(tmp_path / "a")


@pytest.mark.parametrize("fields, message", [
    ({"num_B": 1}, "adapter.options.num_B=1 is out of range"),
    ({"stride_A": 0}, "adapter.options.stride_A=0 is out of range"),
    ({"targets": "lm_head"}, '"lm_head" matches no module'),
    ({"targets": r".*layers\.0\..*q_proj|.*up_proj"}, "in different ones")])
def test_what_cannot_be(fields, message):
  with pytest.raises(errors.UsageError, match=message):
    with_peft.build(block(**fields))


def test_it_is_no_weight():
  tree = with_peft.build(block())
  with pytest.raises(errors.UserError, match="use --format=peft"):
    partition.module(tree, "q_proj", 0).merge(jnp.zeros((32, 32)))


def test_a_step_leaves_its_tokens_together():
  found = memory.MemoryConfig(budget_gib=1.0).whole(8, "adapter.method=lily")
  assert (found.micro_batch, found.mlp_tiles, found.budget_gib) == (8, 1, 1.0)
  for config, rows in ((block(), 8), (adapters_lib.AdapterConfig(), 0)):
    model = types.SimpleNamespace(parts={}, adapter_config=config)
    assert settings.memory(model, None, 8).micro_batch == rows
  for field, text in (("micro_batch", "memory.micro_batch=4"),
                      ("mlp_tiles", "compute.mlp_tiles=4")):
    with pytest.raises(errors.UsageError, match=f"{text}: adapter.method=lily"):
      memory.MemoryConfig(**{field: 4}).whole(8, "adapter.method=lily")
