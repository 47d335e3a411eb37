"""X-LoRA: by hand, both passes with a cache and in parts, and its folders."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import trees
from lora_jax.adapters import xlora
from lora_jax.adapters import xlora_classifier
from lora_jax.models import cache as cache_lib
from lora_jax.models import decoder
from lora_jax.train import loop
from lora_jax.train import optim
from tests import tiny
from tests.adapters import contract
from tests.adapters import passes

CONFIG = contract.CONFIG
B, T, D, C, N, K, I, O, R = 2, 3, 6, 5, 2, 3, 5, 4, 2


def draw(*shape, seed=0):
  return jnp.asarray(
      np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def classifier(depth, **options):
  w = [draw(D, C, seed=1), draw(depth - 2, C, C, seed=2)] if depth > 1 else []
  b = [draw(C, seed=3), draw(depth - 2, C, seed=4)] if depth > 1 else []
  names = ("in", "mid")[:depth - 1]
  return xlora_classifier.Classifier(
      **{f"w_{n}": x for n, x in zip(names, w)},
      **{f"b_{n}": x for n, x in zip(names, b)},
      w_out=draw(C if depth > 1 else D, N, K, seed=5), b_out=draw(N, K, seed=6),
      temperature=jnp.float32(0.7), weight=jnp.float32(1.5),
      drop=jnp.float32(0), **options)


def softmax(x):
  return np.exp(x) / np.exp(x).sum()


def gates_by_hand(c, z, how, top, again):
  """w g `[n, K]` of one token."""
  h = np.asarray(z, np.float64)
  *inner, (w, b) = [[np.asarray(x, np.float64) for x in one]
                    for one in c.layers()]
  for w_in, b_in in inner:
    h = np.maximum(h @ w_in + b_in, 0)
  found = []
  for row in (h @ w + b).reshape(N, K):
    g = softmax(row / 0.7) if how else row
    chosen = np.argsort(-g)[:top or K]
    kept = np.zeros(K)
    kept[chosen] = softmax(g[chosen]) if again else g[chosen]
    found.append(1.5 * kept)
  return found


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("how, top, again", [
    (True, 0, False), (True, 2, False), (False, 2, True), (False, 0, False)])
def test_the_classifier_by_hand(depth, how, top, again):
  c = classifier(depth, softmax=how, top=top, softmax_top=again)
  z = draw(B, T, D, seed=7)
  gates = np.asarray(c.guide(z))
  assert gates.shape == (B, T, N, K)
  expected = [[gates_by_hand(c, token, how, top, again) for token in row]
              for row in z]
  np.testing.assert_allclose(gates, expected, rtol=2e-5, atol=2e-5)
  if top:
    assert ((gates != 0).sum(-1) == top).all()
  if again or (how and not top):
    np.testing.assert_allclose(gates.sum(-1), 1.5, rtol=1e-5)
  # Tokens and projections are not weighed alike.
  assert np.std(gates, (0, 1)).max(-1).min() > 1e-2
  assert np.abs(gates[:, :, 0] - gates[:, :, 1]).max(-1).min() > 1e-3


def experts(ranks=(2, 1, 2)):
  return xlora.Experts(
      a=draw(K, I, R, seed=1), b=draw(K, R, O, seed=2),
      scales=jnp.asarray([1.5, 0.5, 2.0]), rates=jnp.zeros(K),
      ranks=jnp.asarray(ranks), rank=jnp.int32(max(ranks)),
      number=jnp.int32(1))


def test_every_token_has_experts_of_its_own():
  """Experts of different ranks and scales; the second projection's gates."""
  e, w, x = experts(), draw(I, O, seed=3), draw(B, T, I, seed=4)
  gates = draw(B, T, N, K, seed=5)
  expected = np.zeros((B, T, O))
  for at in np.ndindex(B, T):
    token = np.asarray(x[at], np.float64)
    expected[at] = token @ w
    for k, (r, s) in enumerate(((2, 1.5), (1, 0.5), (2, 2.0))):
      expected[at] += s * gates[at][1, k] * (
          token @ e.a[k, :, :r]) @ e.b[k, :r]
  np.testing.assert_allclose(
      e.bound(gates).apply(x, w), expected, rtol=1e-5, atol=1e-5)
  # Where all share theirs, a number counts nothing.
  np.testing.assert_array_equal(
      e.bound(gates[:, :, 1:]).apply(x, w), e.bound(gates).apply(x, w))
  none = experts((0, 0, 0)).bound(gates)
  np.testing.assert_array_equal(none.apply(x, w), x @ w)


def test_experts_drop_out_by_themselves():
  e, w, x = experts((2, 2, 2)), draw(I, O), draw(B, T, I, seed=4)
  e = dataclasses.replace(e, rates=jnp.asarray([0.0, 0.5, 0.5]))
  at = np.arange(B * T, dtype=np.int32).reshape(B, T)
  noise = adapters_lib.Noise(jax.random.key(0), at, at)

  def run(k, noise):
    gates = jnp.broadcast_to(jax.nn.one_hot(k, K), (B, T, 1, K))
    return np.asarray(e.bound(gates).apply(x, w, noise) - x @ w)

  np.testing.assert_allclose(run(0, noise), run(0, None), rtol=1e-4, atol=1e-4)
  masks = []
  for k in (1, 2):
    drawn, s = run(k, noise), float(e.scales[k])
    dropped = np.asarray(noise.for_target(f"expert.{k}").dropout(
        x, jnp.float32(0.5)))
    np.testing.assert_allclose(
        drawn, s * dropped @ np.asarray(e.a[k]) @ np.asarray(e.b[k]),
        rtol=1e-4, atol=1e-4)
    masks.append(dropped == 0)
  assert (masks[0] != masks[1]).any() and masks[0].any()
  assert (adapters_lib.with_rate(e, 0.25).rates == 0.25).all()


# --- both passes


model = passes.xlora


@jax.jit
def gates_of(tree, data):
  own = contract.told(model()[0], tree, data)
  return {name: one.gates for name, one in own.layers.items()}


def test_what_the_classifier_reads_is_the_base_s():
  """The same whatever the experts are, and each projection is given its own,
  in the order of the model's modules."""
  base, tree = model()
  data = contract.batch()
  found = gates_of(tree, data)
  assert found["q_proj"].shape == (3, 2, 12, 3)
  other = dataclasses.replace(tree, layers={
      name: dataclasses.replace(one, b=2 * one.b)
      for name, one in tree.layers.items()})
  jax.tree.map(np.testing.assert_array_equal, gates_of(other, data), found)
  hidden, _ = decoder.forward(
      CONFIG, base, None, data.tokens, data.positions, data.segment_ids)
  whole = np.asarray(tree.shared.guide(hidden))
  for turn, name in enumerate(("q_proj", "up_proj", "down_proj")):
    np.testing.assert_allclose(
        found[name], np.moveaxis(whole[:, :, turn::3], 2, 0), rtol=1e-5,
        atol=1e-6)


def test_an_example_is_read_alone():
  """Packed behind another one, or padded, on its own."""
  base, tree = model()
  data = contract.batch()
  whole = contract.logits(base, tree)
  one = jax.tree.map(lambda x: x[:, 7:], data)
  padded = jax.tree.map(lambda x: np.pad(x, ((0, 0), (0, 4))), one)
  for part in (one, padded):
    found = np.asarray(contract._logits(base, tree, part))[:, :5]
    assert tiny.distance(found, whole[:, 7:]) < 2e-5


def test_a_cache_of_both_passes_gives_what_whole_rows_do():
  base, tree = model()
  tokens = np.random.default_rng(3).integers(0, 31, (3, 20)).astype(np.int32)
  at = np.tile(np.arange(20, dtype=np.int32), (3, 1))
  whole = np.asarray(tiny.logits(
      CONFIG, base, tokens, at, np.ones_like(at), tree))
  cache = passes.check_cache(
      base, tree, tokens, whole,
      cache_lib.init_cache(CONFIG, 3, 10, guided=True))
  # The passes do not see the same.
  assert tiny.distance(cache.first.k, cache.k) > 1e-3


def test_a_cache_without_a_first_pass_is_refused():
  base, tree = model()
  at = np.arange(4, dtype=np.int32)[None]
  with pytest.raises(ValueError, match="guided=True"):
    decoder.forward(
        CONFIG, base, tree, at, at, np.ones_like(at),
        cache=cache_lib.init_cache(CONFIG, 1, 8))


def test_generation_is_what_whole_passes_give():
  passes.check_generation(*model())


# Four programs; test_shadow.py has them of another method of two passes.
@pytest.mark.slow
# Each is a program of its own to compile: one is enough where all are tested.
@pytest.mark.parametrize("how", [
    pytest.param({"remat": "named"}, marks=pytest.mark.slow),
    pytest.param({"remat": "full"}, marks=pytest.mark.slow),
    {"remat": "full", "tiles": 3}], ids=str)
@pytest.mark.parametrize("noise", [
    pytest.param(False, marks=pytest.mark.slow), True])
def test_gradients_do_not_depend_on_how_they_are_computed(how, noise):
  """With dropout in the classifier and of the experts, too."""
  base, tree = model(dropout=0.5)
  passes.check_gradients(
      base, adapters_lib.with_rate(tree, 0.3), noise, **how)


def test_the_first_pass_has_no_gradient():
  """Tokens' rows are trained, too, and are in both passes."""
  base, tree = adapters_lib.build(
      jax.random.key(1), contract.block(
          "xlora", trainable_token_indices=(3, 4)), contract.quantised("none"),
      tiny.paths(CONFIG), geometry=contract.GEOMETRY)
  trainable, frozen = adapters_lib.split(contract.moved(tree, 0.3))
  data = contract.batch()
  data = dataclasses.replace(data, tokens=data.tokens % 5)
  read = (data.tokens, data.positions, data.segment_ids)

  @functools.partial(jax.jit, static_argnames="known")
  @functools.partial(jax.grad, argnums=0)
  def slope(trainable, known=False, first=None):
    own = adapters_lib.join(trainable, frozen)
    if known:
      own = adapters_lib.guided(own, first)
    hidden, _ = decoder.forward(CONFIG, base, own, *read)
    return (hidden ** 2 * jnp.arange(32)).sum()

  tree = adapters_lib.join(trainable, frozen)
  first, _ = decoder.forward(
      CONFIG, base, adapters_lib.unguided(tree), *read)
  expected = slope(trainable, known=True, first=first)
  found = trees.paths(slope(trainable))
  assert any("embed_tokens" in path for path in found)
  for path, leaf in trees.paths(expected).items():
    if "lm_head" in path:
      continue  # Behind the hidden states.
    assert np.abs(leaf).max() > 0, path
    assert tiny.distance(found[path], leaf) < 2e-5, path


def test_a_gradient_of_the_classifier_by_differences():
  base, tree = model()
  data = contract.batch()
  _, grads = passes.gradient(tree, base, contract.stacked(data))
  values = np.asarray(grads.shared.w_out)
  at = np.unravel_index(np.abs(values).argmax(), values.shape)
  losses = []
  for sign in (1, -1):
    w = tree.shared.w_out.at[at].add(sign * 1e-2)
    moved = dataclasses.replace(
        tree, shared=dataclasses.replace(tree.shared, w_out=w))
    value, _ = passes.gradient(moved, base, contract.stacked(data))
    losses.append(float(value))
  slope = (losses[0] - losses[1]) / 2e-2
  assert abs(slope - values[at]) < 0.02 * abs(values[at])


def test_frozen_experts_are_not_trained():
  base, tree = model(trainable=False)
  tree = dataclasses.replace(tree, layers={
      name: dataclasses.replace(one, b=draw(*one.b.shape))
      for name, one in tree.layers.items()})
  assert adapters_lib.trainable_size(tree) == (33 * 8 + 9 * 3 * 9)
  _, grads = passes.gradient(tree, base, contract.stacked(contract.batch()))
  found = trees.paths(grads)
  assert set(found) == {
      f"shared.{name}" for name in ("w_in", "b_in", "w_out", "b_out")}
  for path, leaf in found.items():
    assert np.abs(leaf).max() > 0, path


# Two runs of commands; test_xlora_files.py has the files.
@pytest.mark.slow
def test_a_run_is_saved_and_read(tmp_path):
  """Trained with dropout in the classifier, packed; generated from."""
  whole, rows = passes.whole()
  fields = dict(method="xlora", rank=2, targets="q_proj,up_proj")
  options = {"experts": 2, "depth": 2, "size": 8}
  model = whole.adapt(options=options, **fields)
  assert model.settings(layout="packed", steps=8).noise
  still = whole.adapt(options=options | {"dropout": 0.0}, **fields)
  assert not still.settings(layout="packed", steps=8).noise
  before = model.evaluate(rows).loss
  model, _ = model.train(
      rows, workdir=tmp_path / "w", max_length=16,
      config=loop.TrainConfig(steps=8, batch_size=2),
      optim=optim.OptimConfig(learning_rate=0.02))
  assert model.evaluate(rows).loss < before - 0.02
  model.save(tmp_path / "a")
  back = whole.with_adapter(tmp_path / "a", dropout=0.1)
  assert back.evaluate(rows).loss == model.evaluate(rows).loss
  assert (back.adapters.layers["q_proj"].rates == np.float32(0.1)).all()
  assert back.generate([[1, 2, 3]], max_new_tokens=4) == model.generate(
      [[1, 2, 3]], max_new_tokens=4)
