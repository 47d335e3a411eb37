"""LoRA's relatives by hand and against PEFT: KaSA, BD-LoRA, QA-LoRA, biases."""

from __future__ import annotations

import dataclasses
import types as python_types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax.adapters import base as base_lib
from lora_jax.adapters import bd_lora
from lora_jax.adapters import kasa
from lora_jax.adapters import lora_bias
from lora_jax.adapters import qa_lora
from lora_jax.adapters import registry
from lora_jax.adapters import starts
from lora_jax.export.peft import names
from tests import tiny

torch = pytest.importorskip("torch")
variants = pytest.importorskip("peft.tuners.lora.variants")

I, O, R, SCALE = 12, 8, 4, 0.5


def slot(target="q_proj", options=None, **fields):
  given = {"rank": np.int32(R), "scale": np.float32(SCALE),
           "rate": np.float32(0), "target": target, "width": R,
           "shape": (I, O), "options": options,
           "start": starts.choose("default")}
  return base_lib.Slot(**given | fields)


def weight(seed=0):
  return jnp.asarray(
      np.random.default_rng(seed).standard_normal((I, O)), jnp.float32)


def moved(adapter, seed=1):
  rng = np.random.default_rng(seed)
  trainable, frozen = adapters_lib.split(adapter)
  return adapters_lib.join(jax.tree.map(
      lambda x: x + rng.standard_normal(x.shape).astype(np.float32),
      trainable), frozen)


def product(x, a):
  return np.asarray(x, np.float64) @ np.asarray(a, np.float64)


X = np.random.default_rng(3).standard_normal((2, 5, I)).astype(np.float32)


def test_kasa_takes_out_the_smallest_singular_values():
  w = weight()
  adapter = kasa.init(jax.random.key(0), w, slot(options=kasa.Options()))
  u, s, vt = np.linalg.svd(np.asarray(w, np.float64), full_matrices=False)
  left = (u[:, :-R] * s[:-R]) @ vt[:-R]
  assert tiny.distance(adapter.apply(X, w), product(X, left)) < 1e-5
  assert tiny.distance(adapter.merge(w), left) < 1e-5
  adapter = moved(adapter)
  change = SCALE * product(adapter.a * adapter.d, adapter.b)
  assert tiny.distance(adapter.apply(X, w), product(X, left + change)) < 1e-5
  # It finds them in the weight, where nobody has told it.
  alone = dataclasses.replace(adapter, u=None)
  np.testing.assert_array_equal(alone.apply(X, w), adapter.apply(X, w))
  smaller = dataclasses.replace(
      adapter, rank=np.int32(1), a=0 * adapter.a, b=0 * adapter.b)
  all_but_one = (u[:, :-1] * s[:-1]) @ vt[:-1]
  assert tiny.distance(smaller.merge(w), all_but_one) < 1e-5


def test_kasas_penalty_is_pefts():
  w, options = weight(), kasa.Options(beta=0.3, gamma=0.2)
  one, two = (
      moved(kasa.init(jax.random.key(k), w, slot(options=options)), k)
      for k in (4, 5))
  layers = jax.tree.map(lambda *x: jnp.stack(x), one, two, one.inert())
  tree = base_lib.Adapters(
      layers={"q_proj": layers}, outer={"lm_head": two})
  config = adapters_lib.AdapterConfig(method="kasa", options=options)
  rule, = registry.rules(config, 10, tree)
  params, _ = adapters_lib.split(tree)
  expected = 0.0
  for adapter in (one, two, two):
    a, b, d = (torch.from_numpy(np.array(x)) for x in (
        adapter.a.T, adapter.b.T, adapter.d))
    module = python_types.SimpleNamespace(
        lora_diag={"x": d},
        lora_A={"x": python_types.SimpleNamespace(weight=a)},
        lora_B={"x": python_types.SimpleNamespace(weight=b)})
    expected += float(variants._kasa_layer_regularization_loss(
        module, "x", 0.3, 0.2))
  assert rule.penalty(params) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("target", ["down_proj", "q_proj", "lm_head"])
def test_bd_loras_blocks_are_pefts(target):
  """By its own module, which has A or B in blocks."""
  options = bd_lora.Options()
  w, place = weight(), slot(target, options)
  adapter = moved(bd_lora.init(jax.random.key(0), w, place))
  tensors = {k: torch.from_numpy(np.array(v))
             for k, v in adapter.to_peft().items()}
  x = torch.from_numpy(X)
  for name, (rows, columns), blocks in (
      ("lora_A", (I, R), adapter.n[0]), ("lora_B", (R, O), adapter.n[1])):
    layer = (variants.BlockDiagonalLinear(rows, columns, blocks) if blocks > 1
             else torch.nn.Linear(rows, columns, bias=False))
    assert layer.weight.shape == tensors[f"{name}.weight"].shape
    layer.weight.data = tensors[f"{name}.weight"]
    x = layer(x)
  expected = product(X, w) + SCALE * x.detach().numpy()
  assert tiny.distance(adapter.apply(X, w), expected) < 1e-5
  assert tiny.distance(product(X, adapter.merge(w)), expected) < 1e-5
  back = bd_lora.BDLoRA.from_peft(adapter.to_peft(), place)
  for ours, theirs in zip(jax.tree.leaves(back), jax.tree.leaves(adapter)):
    np.testing.assert_array_equal(ours, theirs)
  size = {"down_proj": R * (I // 2 + O), "q_proj": R * (I + O // 2),
          "lm_head": R * (I + O)}[target]
  assert adapter.size() == size == adapter.a.size + adapter.b.size


def test_pefts_patterns_of_bd_lora_name_targets():
  found = bd_lora._block({"r": 4, "use_bdlora": {
      "target_modules_bd_a": ["down_proj", "attn.o"],
      "target_modules_bd_b": ["_proj.", "q_pro", "up"], "nblocks": 4}})
  assert found["options"] == {
      "nblocks": 4, "blocked_a": ("o_proj", "down_proj"),
      "blocked_b": ("q_proj", "up_proj")}


def test_qa_loras_pooling_is_pefts():
  options = qa_lora.Options(group_size=3)
  w = weight()
  adapter = moved(
      qa_lora.init(jax.random.key(0), w, slot(options=options)))
  assert adapter.a.shape == (4, R)

  a, b = (python_types.SimpleNamespace(weight=torch.from_numpy(np.array(x.T)))
          for x in (adapter.a, adapter.b))
  layer = python_types.SimpleNamespace(
      training=False, in_features=I, lora_A={"x": a}, lora_B={"x": b},
      lora_dropout={"x": torch.nn.Identity()}, scaling={"x": SCALE},
      qalora_group_size={"x": 3})
  expected = variants.QALoraLinearVariant.forward(
      layer, "x", torch.from_numpy(X),
      torch.from_numpy(product(X, w).astype(np.float32))).numpy()
  assert tiny.distance(adapter.apply(X, w), expected) < 1e-5
  assert tiny.distance(product(X, adapter.merge(w)), expected) < 1e-5
  a, b = adapter.factors()
  assert tiny.distance(product(X, w) + product(product(X, a), b),
                       expected) < 1e-5


def test_the_bias_is_scaled():
  w = weight()
  adapter = moved(lora_bias.init(jax.random.key(0), w, slot()))
  np.testing.assert_allclose(adapter.shift(None), SCALE * adapter.c)
  np.testing.assert_allclose(
      adapter.shift(jnp.ones(O)), 1 + SCALE * np.asarray(adapter.c))
  assert adapter.size() == R * (I + O) + O


@pytest.mark.parametrize("init, options, width, message", [
    (kasa.init, kasa.Options(), 8, "adapter.rank=8 leaves nothing of q_proj"),
    (bd_lora.init, bd_lora.Options(nblocks=3), 4,
     "nblocks=3 does not divide adapter.rank=4 and the 8 features of q_proj"),
    (qa_lora.init, qa_lora.Options(group_size=5), 4,
     "group_size=5 does not divide the 12 inputs of q_proj"),
])
def test_what_does_not_fit_is_refused(init, options, width, message):
  with pytest.raises(errors.UsageError, match=message):
    init(jax.random.key(0), weight(), slot(
        options=options, width=width, rank=np.int32(width)))


@pytest.mark.parametrize("config, name", [
    ({}, "lora"), ({"lora_bias": True}, "lora_bias"),
    ({"kasa_config": {"beta": 1e-4, "gamma": 1e-3}}, "kasa"),
    ({"use_bdlora": {"nblocks": 2}}, "bd_lora"), ({"use_dora": True}, "dora"),
    ({"use_rslora": True, "kasa_config": None}, "rslora"),
])
def test_a_config_says_which_of_them_it_is(config, name):
  found, _ = names.method_of({"peft_type": "LORA"} | config, "x")
  assert found == name


@pytest.mark.parametrize("config", [
    {"use_dora": True, "use_rslora": True},
    {"use_bdlora": {"nblocks": 2}, "kasa_config": {"beta": 1}},
    {"lora_bias": True, "use_rslora": True}, {"use_qalora": True},
    {"alora_invocation_tokens": [1]}, {"velora_config": {"scale": 1}},
])
def test_what_would_be_another_is_refused(config):
  with pytest.raises(errors.UserError, match="is not supported"):
    names.method_of({"peft_type": "LORA"} | config, "x")
