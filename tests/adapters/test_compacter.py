"""Compacter against Kronecker products in numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax.adapters import compacter
from lora_jax.adapters import registry
from lora_jax.export import peft as peft_export
from lora_jax.models import modules
from tests import tiny
from tests.adapters import contract


def build(method="compacter", **fields):
  block = contract.block(method, **fields)
  _, tree = adapters_lib.build(
      jax.random.key(3), block, contract.quantised("none"),
      modules.paths(contract.CONFIG), geometry=contract.GEOMETRY)
  return registry.checked(block), tree


def kronecker(rules, s, t):
  return sum(np.kron(a, u @ v) for a, u, v in zip(
      *(np.asarray(x, np.float64) for x in (rules, s, t)), strict=True))


def test_a_hand_computed_product():
  """Two rules, the identity and the exchange of two blocks, of 1 x 1 parts."""
  rules = jnp.asarray([[[1.0, 0], [0, 1]], [[0, 1], [1, 0]]])
  s, t = jnp.asarray([[[2.0]], [[3.0]]]), jnp.asarray([[[10.0]], [[1.0]]])
  # D = 20 I + 3 X = [[20, 3], [3, 20]].
  found = compacter.product(jnp.asarray([1.0, 2]), rules, s, t)
  np.testing.assert_allclose(found, [20 + 6, 3 + 40])


@pytest.mark.parametrize("options", [
    {}, {"divisor": 2, "phm_rank": 3, "activation": "relu"}])
def test_it_is_the_paper_s_equation(options):
  _, tree = build(options=options)
  tree = contract.moved(tree, 0.5)
  one = adapters_lib.module(tree, "mlp", 1)
  rng = np.random.default_rng(0)
  y = rng.standard_normal((2, 3, 32)).astype(np.float32)
  down = kronecker(one.rules, one.down_s, one.down_t)
  up = kronecker(one.rules, one.up_s, one.up_t)
  assert down.shape == (32, 4) and up.shape == (4, 32)
  inner = y @ down + np.asarray(one.down_bias)
  tanh = np.tanh((2 / np.pi) ** 0.5 * (inner + 0.044715 * inner ** 3))
  active = np.maximum(inner, 0) if options else inner * (1 + tanh) / 2
  expected = y + active @ up + np.asarray(one.up_bias)
  assert tiny.distance(one.residual(None, jnp.asarray(y)), expected) < 1e-5
  # In 16 bits, and where a layer is not adapted.
  small = one.residual(None, jnp.asarray(y, jnp.bfloat16))
  assert small.dtype == jnp.bfloat16
  assert tiny.distance(small.astype(jnp.float32), expected) < 3e-2
  np.testing.assert_array_equal(one.inert().residual(None, y), y)


def test_dropout_is_of_what_enters():
  _, tree = build()
  one = adapters_lib.module(contract.moved(tree, 0.5), "mlp", 0).with_rate(0.5)
  noise = adapters_lib.Noise(
      jax.random.key(0), jnp.zeros((1, 3), jnp.int32), jnp.arange(3)[None])
  y = jnp.asarray(np.random.default_rng(0).standard_normal((1, 3, 32)),
                  jnp.float32)
  dropped = noise.dropout(y, one.rate)
  np.testing.assert_allclose(
      one.residual(None, y, noise) - y,
      one.residual(None, dropped) - dropped, atol=1e-5)
  assert tiny.distance(one.residual(None, y, noise),
                       one.residual(None, y)) > 1e-2


@pytest.mark.parametrize("method,blocks", [
    ("compacter", ("self_attn", "mlp")), ("compacter_plus", ("mlp",))])
def test_where_they_stand_and_what_they_train(method, blocks):
  _, tree = build(method)
  assert set(tree.layers) == set(blocks)
  assert tree.shared.rules.shape == (4, 4, 4)
  a_block = 2 * (32 + 4) + 4 + 32
  assert adapters_lib.trainable_size(tree) == (
      len(blocks) * 3 * a_block + 4 ** 3)
  one = tree.layers["mlp"]
  assert not np.any(one.up_t) and not np.any(one.down_bias)
  # Glorot-uniform of a 8 x 1 part, and rules of standard deviation 0.01.
  assert float(np.abs(one.down_s).max()) <= (6 / 9) ** 0.5
  assert abs(float(np.std(one.down_s)) * 3 ** 0.5 - (6 / 9) ** 0.5) < 0.1
  assert abs(float(np.std(tree.shared.rules)) - 0.01) < 0.003


def test_all_layers_train_the_same_rules():
  """Their gradient is the sum of those that each layer alone would give."""
  _, tree = build("compacter_plus")
  tree = contract.moved(tree)
  base, data = contract.quantised("none"), contract.stacked(contract.batch())
  trainable, frozen = adapters_lib.split(tree)
  _, grads = contract.gradient(
      trainable, frozen, base, data, jax.random.key(0))
  step = 1e-2
  for at in ((0, 1, 2), (3, 0, 0)):
    ends = []
    for sign in (1, -1):
      rules = tree.shared.rules.at[at].add(sign * step)
      moved = adapters_lib.split(adapters_lib.Adapters(
          layers=tree.layers, shared=compacter.Rules(rules=rules)))
      ends.append(contract.gradient(
          *moved, base, data, jax.random.key(0))[0])
    slope = float(ends[0] - ends[1]) / (2 * step)
    assert abs(slope - float(grads.shared.rules[at])) < 0.02 * max(
        0.01, abs(slope))


def test_files_hold_the_rules_once(tmp_path):
  block, tree = build("compacter_plus", layers="0,2")
  tree = contract.moved(tree)
  paths = modules.paths(contract.CONFIG)
  peft_export.write(tmp_path / "a", tree, peft_export.peft_config(
      block, tree, paths), paths)
  loaded = peft_export.read(
      tmp_path / "a", paths, modules.shapes(contract.CONFIG),
      geometry=contract.GEOMETRY)
  assert loaded.config.method == "compacter_plus"
  stored = safetensors.numpy.load_file(tmp_path / "a" / peft_export.WEIGHTS)
  assert len(stored) == 2 * 6 + 1
  assert stored["base_model.rules"].shape == (4, 4, 4)
  np.testing.assert_array_equal(loaded.adapters.shared.rules,
                                tree.shared.rules)
  base = contract.quantised("none")
  np.testing.assert_array_equal(
      contract.logits(base, loaded.adapters), contract.logits(base, tree))


@pytest.mark.parametrize("fields,text", [
    ({"rank": 6}, "adapter.rank=6 is not a multiple"),
    ({"options": {"divisor": 5}, "rank": 5}, "width=32 is not a multiple"),
    ({"options": {"phm_rank": 0}}, "phm_rank=0 is out of range"),
    ({"options": {"activation": "x"}}, "options.activation")])
def test_what_cannot_be_divided_is_refused(fields, text):
  with pytest.raises(errors.UsageError, match=text):
    build(**fields)
