"""ShadowPEFT: by hand, in packed and padded rows, cached, and PEFT's."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import trees
from lora_jax.adapters import shadow
from lora_jax.models import beside
from lora_jax.models import cache as cache_lib
from lora_jax.models import decoder
from lora_jax.models import init
from lora_jax.train import loop
from lora_jax.train import optim
from lora_jax.train import step as step_lib
from tests import tiny
from tests.adapters import contract
from tests.adapters import passes

CONFIG = contract.CONFIG
B, T, D, U, R = 2, 3, 6, 5, 2


def draw(*shape, seed=0):
  return jnp.asarray(
      np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def model(**fields):
  """A base, and adapters of which everything matters."""
  _, tree = adapters_lib.build(
      jax.random.key(1), contract.block("shadow", **fields),
      contract.quantised("none"), tiny.paths(CONFIG),
      geometry=contract.GEOMETRY)
  return contract.quantised("none"), contract.moved(tree, 0.2)


def logits(base, tree, tokens, positions=None, segments=None):
  at = np.tile(np.arange(tokens.shape[1], dtype=np.int32), (len(tokens), 1))
  return np.asarray(tiny.logits(
      CONFIG, base, tokens, at if positions is None else positions,
      np.ones_like(at) if segments is None else segments, tree))


# --- by hand


def block(rank=R):
  shapes = {"down": (D, R), "up": (R, D)} | {
      f"{mlp}_{name}": shape for mlp in "tg" for name, shape in (
          ("in", (D, U)), ("in_bias", (U,)), ("out", (U, D)),
          ("out_bias", (D,)))}
  return shadow.ShadowLayer(
      **{name: draw(*shape, seed=n)
         for n, (name, shape) in enumerate(shapes.items())},
      scale=jnp.float32(0.3), rate=jnp.float32(0.5), rank=jnp.int32(rank))


def test_a_layer_by_hand():
  one, h, s, y = block(), *(draw(B, T, D, seed=n) for n in (20, 21, 22))
  w = {f.name: np.asarray(getattr(one, f.name), np.float64)
       for f in dataclasses.fields(one)}

  def gelu(x):
    return np.vectorize(lambda v: v * 0.5 * (1 + math.erf(v / 2 ** 0.5)))(x)

  entered, left = np.zeros((B, T, D)), np.zeros((B, T, D))
  for b in range(B):
    for t in range(T):
      x = np.asarray(h[b, t] - s[b, t], np.float64)
      entered[b, t] = h[b, t] + 0.3 * (x @ w["down"] @ w["up"])
      out = np.asarray(y[b, t], np.float64)
      new, gate = (
          gelu(out @ w[f"{n}_in"] + w[f"{n}_in_bias"]) @ w[f"{n}_out"]
          + w[f"{n}_out_bias"] for n in "tg")
      gate = 1 / (1 + np.exp(-gate))
      left[b, t] = (1 - gate) * s[b, t] + gate * new
  np.testing.assert_allclose(one.entered(h, s), entered, atol=2e-6)
  np.testing.assert_allclose(one.left(y, s), left, atol=2e-6)


def test_a_layer_that_is_not_adapted_passes_both_on():
  one, h, s = block(rank=0), draw(B, T, D, seed=1), draw(B, T, D, seed=2)
  np.testing.assert_array_equal(one.entered(h, s), h)
  np.testing.assert_array_equal(one.left(h, s), s)


def test_the_state_begins_with_a_model_of_its_own():
  """Whose embeddings are the base's, with what is trained of them."""
  base, tree = model(trainable_token_indices=(8, 9))
  data = contract.batch()
  small = dataclasses.replace(
      CONFIG, n_layers=2, d_model=32, d_ff=48, tie_embeddings=True)
  own = init.random_base(jax.random.key(5), small)
  own = dataclasses.replace(
      own, norm=tree.shared.norm, embed_tokens=tree.outer[
          "embed_tokens"].merge(base.embed_tokens),
      layers={name: decoder.Linear(
          weight=tree.shared.layers[name].weight,
          bias=tree.shared.layers[name].bias) if hasattr(one, "weight")
              else tree.shared.layers[name]
              for name, one in own.layers.items()})
  expected, _ = decoder.forward(
      small, own, None, data.tokens, data.positions, data.segment_ids)
  assert (data.tokens == 8).any()
  assert tiny.distance(contract.begun(base, tree, data), expected) < 2e-6


def test_dropout_is_of_the_difference():
  one, ones = block(), jnp.ones((B, T), jnp.int32)
  noise = adapters_lib.Noise(
      jax.random.key(0), ones, jnp.tile(jnp.arange(T), (B, 1)))
  h, s = draw(B, T, D, seed=1), draw(B, T, D, seed=2)
  apart = noise.dropout(h - s, one.rate)
  assert 0 < (apart == 0).sum() < apart.size
  np.testing.assert_allclose(
      one.entered(h, s, noise), h + 0.3 * (apart @ one.down @ one.up),
      atol=1e-5)


# --- rows and caches


def test_examples_of_a_row_do_not_see_each_other():
  base, tree = model()
  tokens = np.random.default_rng(1).integers(0, 31, (2, 9)).astype(np.int32)
  whole = logits(base, tree, tokens)
  positions = np.concatenate([np.arange(9), np.arange(5), np.zeros(4)])
  segments = np.repeat([1, 2, 0], [9, 5, 4])
  row = np.concatenate([tokens[0], tokens[1, :5], [7] * 4])
  found = logits(base, tree, row[None], positions.astype(np.int32)[None],
                 segments.astype(np.int32)[None])[0]
  assert tiny.distance(found[:9], whole[0]) < 2e-5
  assert tiny.distance(found[9:14], whole[1, :5]) < 2e-5


def test_caches_of_both_give_what_whole_rows_do():
  base, tree = model()
  tokens = np.random.default_rng(3).integers(0, 31, (3, 20)).astype(np.int32)
  cache = cache_lib.init_cache(
      CONFIG, 3, 10, reader=beside.model(CONFIG, tree))
  assert cache.first.k.shape[0] == 2 and cache.k.shape[0] == 3
  passes.check_cache(base, tree, tokens, logits(base, tree, tokens), cache)


def test_a_cache_of_the_model_alone_is_refused():
  base, tree = model()
  at = np.arange(4, dtype=np.int32)[None]
  with pytest.raises(ValueError, match=r"reader=beside\.model"):
    decoder.forward(CONFIG, base, tree, at, at, at * 0 + 1,
                    cache=cache_lib.init_cache(CONFIG, 1, 8))


def test_generation_is_what_whole_passes_give():
  passes.check_generation(*model())


# --- training


@pytest.mark.parametrize("how", [
    {"remat": "named"}, {"remat": "full"}, {"remat": "full", "tiles": 3}],
                         ids=str)
@pytest.mark.parametrize("noise", [False, True])
def test_gradients_do_not_depend_on_how_they_are_computed(how, noise):
  base, tree = model(dropout=0.3)
  passes.check_gradients(base, tree, noise, **how)


# Two more programs; test_contract.py has every method's bfloat16.
@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "named"])
def test_a_bf16_step_is_near_the_exact_one(remat):
  """Beside an NF4 base; there products of the same x are one."""
  base, tree = contract.randomised("shadow", "nf4")
  data = contract.stacked(contract.batch())
  exact, expected = passes.gradient(tree, base, data)
  value, grads = jax.jit(functools.partial(
      step_lib.loss_and_grads, model=CONFIG, settings=step_lib.Settings(
          dtype="bfloat16", remat=remat)))(
              *adapters_lib.split(tree), base, data, jax.random.key(0))
  assert abs(value - exact) < 0.05
  expected = trees.paths(expected)
  for path, leaf in trees.paths(grads).items():
    assert leaf.dtype == jnp.float32, path
    assert tiny.distance(leaf, expected[path]) < 0.2, path


# Two programs; test_runs.py has layers in several runs.
@pytest.mark.slow
def test_layers_in_several_runs_compute_the_same():
  """Those before the first that is adapted have a scan of their own."""
  base, tree = model(layers="2")
  assert len(adapters_lib.spans(tree.layers, 3)) == 2
  stack, = (one for one, *_ in adapters_lib.stacks(tree.layers["layer"]))
  whole = jax.tree.map(
      lambda x: jnp.concatenate([jnp.zeros((2, *x.shape[1:]), x.dtype), x]),
      stack)
  one = dataclasses.replace(tree, layers={"layer": whole})
  data = contract.batch()
  np.testing.assert_allclose(
      contract.logits(base, tree), contract.logits(base, one), atol=1e-5)
  value, grads = passes.gradient(tree, base, contract.stacked(data))
  other, others = passes.gradient(one, base, contract.stacked(data))
  np.testing.assert_allclose(value, other, rtol=1e-6)
  for path, leaf in trees.paths(grads.shared).items():
    assert tiny.distance(leaf, trees.paths(others.shared)[path]) < 2e-5, path


# Two runs of commands; test_shadow_files.py has the files.
@pytest.mark.slow
def test_a_run_is_saved_and_read(tmp_path):
  """Trained with dropout, packed, at LoRA+'s rates; generated from."""
  whole, rows = passes.whole()
  model = whole.adapt(
      method="shadow", rank=4, dropout=0.1, options={"strength": 0.5})
  before = model.evaluate(rows).loss
  model, _ = model.train(
      rows, workdir=tmp_path / "w", max_length=16,
      config=loop.TrainConfig(steps=8, batch_size=2),
      optim=optim.OptimConfig(learning_rate=0.02, lora_plus_ratio=2.0))
  assert model.evaluate(rows).loss < before - 0.02
  model.save(tmp_path / "a")
  back = whole.with_adapter(tmp_path / "a")
  assert back.evaluate(rows).loss == model.evaluate(rows).loss
  assert back.generate([[1, 2, 3]], max_new_tokens=4) == model.generate(
      [[1, 2, 3]], max_new_tokens=4)
