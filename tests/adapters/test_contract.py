"""What every method promises on every base format, from the registries.

A method or format that is added to its table is tested here by that alone.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import quant
from lora_jax import trees
from lora_jax import types
from lora_jax.adapters import base as base_lib
from lora_jax.export import peft
from lora_jax.models import config as config_lib
from lora_jax.models import decoder
from lora_jax.models import init
from lora_jax.train import step as step_lib
from tests import tiny

CONFIG = config_lib.ModelConfig(
    family="llama", vocab_size=31, d_model=32, d_ff=48, n_layers=3, n_heads=4,
    n_kv_heads=2, head_dim=8, tie_embeddings=False, qkv_bias=True)
METHODS = sorted(m for m in adapters_lib.METHODS if m != "none")
FORMATS = ["none", *sorted(quant.FORMATS)]
EVERY = "all-linear,embed_tokens,lm_head"

each = pytest.mark.parametrize("method", METHODS)
each_format = pytest.mark.parametrize("fmt", FORMATS)


@functools.cache
def quantised(fmt):
  base = init.random_base(jax.random.key(0), CONFIG)
  if fmt == "none":
    return base
  spec = quant.QuantSpec(format=fmt, block_size=32)
  layers = {
      name: one.replace(weight=quant.quantize(one.weight, spec))
      if isinstance(one, decoder.Linear) else one
      for name, one in base.layers.items()}
  return base.replace(layers=layers)


def block(method, **fields):
  return adapters_lib.AdapterConfig(
      **{"method": method, "rank": 4, "alpha": 8.0, "targets": EVERY,
         "rank_pattern": {"layers.1.mlp.up_proj": 2}} | fields)


@functools.cache
def built(method, fmt):
  return adapters_lib.build(
      jax.random.key(1), block(method), quantised(fmt), tiny.paths(CONFIG))


def randomised(method, fmt):
  """(base, adapters) with every trained leaf moved off its start."""
  base, tree = built(method, fmt)
  trainable, frozen = adapters_lib.split(tree)
  leaves, structure = jax.tree.flatten(trainable)
  keys = jax.random.split(jax.random.key(2), len(leaves))
  moved = [x + 0.1 * jax.random.normal(k, x.shape)
           for k, x in zip(keys, leaves)]
  tree = adapters_lib.join(structure.unflatten(moved), frozen)
  return base, tree if method == "full" else tiny.mask(tree)


@functools.cache
def batch():
  b, t = 2, 12
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, CONFIG.vocab_size, (b, t)).astype(np.int32)
  segments = np.ones((b, t), np.int32)
  segments[:, 7:] = 2
  positions = np.where(segments == 1, np.arange(t), np.arange(t) - 7)
  return types.Batch(
      tokens=tokens, targets=np.roll(tokens, -1, 1),
      loss_weights=(np.arange(t) != 6)[None].repeat(b, 0).astype(np.float32),
      positions=positions.astype(np.int32), segment_ids=segments,
      example_ids=segments + 10 * np.arange(b, dtype=np.int32)[:, None])


@jax.jit
def logits(base, tree):
  data = batch()
  hidden, _ = decoder.forward(
      CONFIG, base, tree, data.tokens, data.positions, data.segment_ids)
  return decoder.unembed(CONFIG, base, tree, hidden)


@functools.partial(jax.jit, static_argnames=("noise", "dtype"))
def gradient(trainable, frozen, base, data, key, noise=False,
             dtype="float32"):
  return step_lib.loss_and_grads(
      trainable, frozen, base, data, key, model=CONFIG,
      settings=step_lib.Settings(dtype=dtype, noise=noise))


def stacked(data):
  return jax.tree.map(lambda x: x[None], data)


@pytest.mark.parametrize("method", [
    m for m in METHODS if adapters_lib.METHODS[m].identity_at_init])
@each_format
def test_it_is_the_identity_at_init(method, fmt):
  base, tree = built(method, fmt)
  np.testing.assert_allclose(
      logits(base, tree), logits(quantised(fmt), None), rtol=0, atol=2e-5)


@each
@each_format
def test_merging_computes_the_same(method, fmt):
  base, tree = randomised(method, fmt)
  adapted = logits(base, tree)
  plain = logits(quantised(fmt), None)
  assert float(jnp.abs(adapted - plain).max()) > 0.1
  whole = decoder.combined(base, tree)
  layers = dict(whole.layers)
  for name, adapter in tree.layers.items():
    weights = layers[name].weight
    layers[name] = layers[name].replace(weight=jnp.stack([
        one(adapter, i).merge(one(weights, i))
        for i in range(CONFIG.n_layers)]))
  outer = {}
  if "embed_tokens" in tree.outer:
    outer["embed_tokens"] = tree.outer["embed_tokens"].merge(
        whole.embed_tokens)
  if "lm_head" in tree.outer:
    outer["lm_head"] = whole.lm_head.replace(
        weight=tree.outer["lm_head"].merge(whole.lm_head.weight))
  merged = whole.replace(layers=layers, **outer)
  assert tiny.distance(logits(merged, None), adapted) < 2e-5


@each
def test_preparing_for_decoding_changes_nothing(method):
  base, tree = randomised(method, "nf4")
  before = logits(base, tree)
  assert tiny.distance(
      logits(base, adapters_lib.prepared(tree, base)), before) < 2e-6


def one(tree, i):
  return jax.tree.map(lambda x: x[i], tree)


@each
@each_format
def test_gradients_are_finite_and_reach_every_leaf(method, fmt):
  base, tree = randomised(method, fmt)
  trainable, frozen = adapters_lib.split(tree)
  value, grads = gradient(
      trainable, frozen, base, stacked(batch()), jax.random.key(0))
  assert np.isfinite(value)
  for path, leaf in trees.paths(grads).items():
    assert np.isfinite(leaf).all(), path
    assert np.abs(leaf).max() > 0, path


@each
def test_scan_computes_what_a_loop_does(method):
  base, tree = randomised(method, "nf4")
  data = batch()
  whole = decoder.combined(base, tree)
  cos_sin = decoder.rope.tables(CONFIG.rope, CONFIG.head_dim, data.positions)
  context = decoder.Context(
      *cos_sin, data.positions, data.segment_ids, data.positions,
      data.segment_ids)
  hidden = decoder._embed(whole, tree, data.tokens, jnp.float32)
  for i in range(CONFIG.n_layers):
    hidden, _ = decoder.layer(
        CONFIG, context, hidden, one(whole.layers, i), one(tree.layers, i))
  hidden = decoder.layers_lib.rms_norm(hidden, whole.norm, CONFIG.norm_eps)
  assert tiny.distance(
      decoder.unembed(CONFIG, base, tree, hidden), logits(base, tree)) < 2e-6


@each
def test_the_count_is_that_of_the_formula(method):
  _, tree = built(method, "none")
  d, f, v, kv, l = 32, 48, 31, 16, 3
  sizes = {"q_proj": (d, d), "k_proj": (d, kv), "v_proj": (d, kv),
           "o_proj": (d, d), "gate_proj": (d, f), "up_proj": (d, f),
           "down_proj": (f, d)}
  outer = [(v, d), (d, v)]
  low_rank = 4 * (l * sum(map(sum, sizes.values())) + sum(map(sum, outer)))
  low_rank -= 2 * sum(sizes["up_proj"])  # the rank pattern's module
  outputs = l * sum(o for _, o in sizes.values()) + d + v
  everything = (
      l * (sum(i * o for i, o in sizes.values()) + d + 2 * kv + 2 * d)
      + d + 2 * v * d)
  expected = {"lora": low_rank, "rslora": low_rank,
              "dora": low_rank + outputs, "full": everything}
  assert adapters_lib.trainable_size(tree) == expected[method]


@each
def test_dropout_depends_on_step_example_and_position_alone(method):
  base, tree = randomised(method, "none")
  frozen_rate = lambda x: x.replace(rate=jnp.full_like(x.rate, 0.5))
  is_adapter = lambda x: isinstance(x, base_lib.Adapter)
  tree = jax.tree.map(
      lambda x: frozen_rate(x) if is_adapter(x) else x, tree,
      is_leaf=is_adapter)
  trainable, frozen = adapters_lib.split(tree)
  run = functools.partial(gradient, trainable, frozen, base, noise=True)
  data, key = batch(), jax.random.key(3)
  value, grads = run(stacked(data), key)
  again, _ = run(stacked(data), key)
  assert value == again
  # The same rows in another order, and as two micro-batches of one row.
  swapped, _ = run(stacked(jax.tree.map(lambda x: x[::-1], data)), key)
  split, split_grads = run(jax.tree.map(lambda x: x[:, None], data), key)
  np.testing.assert_allclose([swapped, split], [value] * 2, rtol=1e-6)
  for path, leaf in trees.paths(grads).items():
    other = trees.paths(split_grads)[path]
    scale = np.abs(leaf).max() + 1e-12
    assert np.abs(leaf - other).max() / scale < 1e-5, path
  if method != "full":
    other_step, _ = run(stacked(data), jax.random.key(4))
    assert abs(other_step - value) > 1e-3


@each
def test_a_bf16_step_stays_finite(method):
  base, tree = randomised(method, "nf4")
  trainable, frozen = adapters_lib.split(tree)
  value, grads = gradient(
      trainable, frozen, base, stacked(batch()), jax.random.key(0),
      dtype="bfloat16")
  exact, _ = gradient(
      trainable, frozen, base, stacked(batch()), jax.random.key(0))
  assert abs(value - exact) < 0.05
  for path, leaf in trees.paths(grads).items():
    assert leaf.dtype == jnp.float32 and np.isfinite(leaf).all(), path


@each
def test_split_and_join_are_inverse(method):
  _, tree = built(method, "nf4")
  trainable, frozen = adapters_lib.split(tree)
  joined = adapters_lib.join(trainable, frozen)
  assert jax.tree.structure(joined) == jax.tree.structure(tree)
  both = trees.size(trainable) + trees.size(frozen)
  assert both == trees.size(tree)


def test_padding_of_a_smaller_rank_stays_zero():
  base, tree = built("lora", "none")
  trainable, frozen = adapters_lib.split(tree)
  _, grads = gradient(
      trainable, frozen, base, stacked(batch()), jax.random.key(0))
  up = grads.layers["up_proj"]
  assert not np.any(up.a[1, :, 2:]) and not np.any(up.b[1, 2:])
  assert np.any(up.b[1, :2]) and np.any(up.b[0, 2:])


def test_the_base_is_skipped_where_a_layer_is_not_chosen():
  _, tree = adapters_lib.build(
      jax.random.key(1),
      block("dora", layers="0,2", targets="mlp", rank_pattern={}),
      quantised("none"), tiny.paths(CONFIG))
  ranks = np.asarray(tree.layers["up_proj"].rank)
  assert ranks.tolist() == [4, 0, 4]
  base = quantised("none")
  adapter = one(tree.layers["up_proj"], 1)
  x = jax.random.normal(jax.random.key(0), (5, 32))
  weight = one(base.layers["up_proj"].weight, 1)
  moved = adapter.replace(m=adapter.m * 2)
  np.testing.assert_array_equal(moved.apply(x, weight), x @ weight)


@pytest.mark.parametrize("method", [
    m for m in METHODS
    if getattr(adapters_lib.METHODS[m].adapter, "peft_type", None)])
@pytest.mark.parametrize("fmt", ["none", "nf4"])
def test_a_peft_folder_gives_the_adapter_back(method, fmt, tmp_path):
  base, tree = randomised(method, fmt)
  paths = tiny.paths(CONFIG)
  peft.write(tmp_path / "a", tree, peft.peft_config(
      block(method), tree, paths), paths)
  read = adapters_lib.beside(
      peft.read(tmp_path / "a", paths, tiny.shapes(CONFIG)).adapters, base)
  ours, theirs = trees.paths(tree), trees.paths(read)
  assert ours.keys() == theirs.keys()
  for path, leaf in ours.items():
    np.testing.assert_array_equal(leaf, theirs[path], path)
  np.testing.assert_array_equal(
      logits(base, read), logits(base, tree))
