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
from lora_jax import trees
from lora_jax.adapters import assemble
from lora_jax.adapters import partition
from lora_jax.adapters import registry
from lora_jax.models import decoder
from lora_jax.models import embedding
from tests import tiny
from tests.adapters import contract

CONFIG = contract.CONFIG
ROWS = adapters_lib.METHODS


def by_method(methods, fast):
  return pytest.mark.parametrize("method", [
      m if fast(m) else pytest.param(m, marks=pytest.mark.slow)
      for m in methods])


# Of each way into a model: on weights, with what layers share, by examples,
# beside a module, before keys, at the embeddings, in place of weights.
WHOLE = ("lora", "dora", "ia3", "vera", "lily", "xlora", "shadow", "houlsby",
         "prefix", "llama_adapter", "prompt", "full", "bitfit")


def compiled(method):
  return method in WHOLE


each = by_method(contract.METHODS, compiled)
adapting = by_method(contract.ADAPTING, compiled)
# One of each way from layer to layer: alone, with what layers share, bound to
# a first pass, with a state beside, before the keys, without an adapter.
SCANNED = "lora", "vera", "lily", "xlora", "shadow", "prefix", "full"
scanned = by_method(contract.METHODS, lambda m: m in SCANNED)
# Whole models of these; of every method in test_contract_formats.py. Those
# that are slow go the same way as one that is not.
some = pytest.mark.parametrize("method", [
    m if m in ("lora", "houlsby", "prefix")
    else pytest.param(m, marks=pytest.mark.slow)
    for m in ("lora", "dora", "ia3", "houlsby", "prefix", "prompt", "full")])


def base_format(method):
  """Decoding seven weights is half of what is compiled, and the same for all:
  test_contract_formats.py has every method over quantised weights."""
  return "nf4" if contract.alike(method) or method in (
      "lora", "dora", "vera", "ia3", "houlsby", "prefix", "full") else "none"


@functools.cache
def plain(fmt):
  return contract.logits(contract.quantised(fmt), None)


@each
def test_it_is_the_identity_at_init_where_it_says_so(method):
  base, tree = contract.built(method, base_format(method))
  found = contract.logits(base, tree)
  away = float(np.abs(found - plain(base_format(method))).max())
  if ROWS[method].identity_at_init:
    assert away < 2e-5
  else:
    assert away > 1e-3


@each
def test_merging_computes_the_same(method):
  base, tree = contract.randomised(method, base_format(method))
  adapted = contract.logits(base, tree)
  assert np.abs(adapted - plain(base_format(method))).max() > 1e-2
  if ROWS[method].mergeable:
    merged = _merged(base, tree)
    assert tiny.distance(contract.logits(merged, None), adapted) < 2e-5


@jax.jit
def _merged(base, tree):
  """A base that computes what the two do. In one program: compiling many
  small ones takes longer."""
  whole = decoder.combined(base, tree)
  layers = dict(whole.layers)
  for name in tree.layers:
    module = layers[name]
    adapters = [adapters_lib.module(tree, name, i)
                for i in range(CONFIG.n_layers)]
    weights = getattr(module, "weight", module)
    merged = jnp.stack([
        a.merge(contract.one(weights, i)) for i, a in enumerate(adapters)])
    if module is weights:
      layers[name] = merged
      continue
    biases = [a.shift(None if module.bias is None else module.bias[i])
              for i, a in enumerate(adapters)]
    layers[name] = module.replace(
        weight=merged, bias=None if biases[0] is None else jnp.stack(biases))
  outer = {}
  for name in tree.outer:
    adapter, module = adapters_lib.module(tree, name, None), getattr(
        whole, name)
    outer[name] = (
        module.replace(weight=adapter.merge(module.weight),
                       bias=adapter.shift(module.bias))
        if name == "lm_head" else adapter.merge(module))
  return whole.replace(layers=layers, **outer)


@adapting
def test_preparing_for_decoding_changes_nothing(method):
  base, tree = contract.randomised(method, base_format(method))
  prepared = adapters_lib.prepared(tree, base)
  if jax.tree.structure(prepared) == jax.tree.structure(tree) and all(
      a is b or np.array_equal(a, b) for a, b in zip(
          jax.tree.leaves(prepared), jax.tree.leaves(tree))):
    return  # There is nothing that it prepares.
  before = contract.logits(base, tree)
  assert tiny.distance(contract.logits(base, prepared), before) < 2e-6


@each
def test_gradients_are_finite_and_zero_exactly_where_it_says_so(method):
  base, tree = contract.randomised(method, base_format(method))
  trainable, frozen = adapters_lib.split(tree)
  data = contract.stacked(contract.batch_of(tree))
  value, grads = contract.gradient(
      trainable, frozen, base, data, jax.random.key(0))
  assert np.isfinite(value)
  for path, leaf in trees.paths(grads).items():
    assert np.isfinite(leaf).all(), path
    assert np.abs(leaf).max() > 0, path
  # At the start, too.
  _, tree = contract.built(method, base_format(method))
  trainable, frozen = adapters_lib.split(tree)
  _, grads = contract.gradient(
      trainable, frozen, base, data, jax.random.key(0))
  zero = ROWS[method].zero_gradients
  for path, leaf in trees.paths(grads).items():
    if "embed_tokens" in path:
      continue  # There A and B change places.
    assert (np.abs(leaf).max() == 0) == (path.split(".")[-1] in zero), path


@scanned
def test_scan_computes_what_a_loop_does(method):
  base, tree = contract.randomised(method, base_format(method))
  data = contract.batch_of(tree)
  whole = decoder.combined(base, tree)
  ahead = decoder._prefix_length(tree)
  cos_sin = decoder.rope.tables(
      CONFIG.rope, CONFIG.head_dim, data.positions + ahead)
  context = decoder.Context(
      *cos_sin, data.positions, data.segment_ids, data.positions,
      data.segment_ids)
  hidden = embedding.embed(
      whole.embed_tokens, tree, data.tokens, jnp.float32)
  layer = jax.jit(decoder.around, static_argnums=0)
  own = contract.told(base, tree, data)
  carry = hidden, contract.begun(base, tree, data)
  for i in range(CONFIG.n_layers):
    adapters = {name: adapters_lib.module(own, name, i)
                for name in tree.layers}
    carry, _ = layer(
        CONFIG, context, carry, contract.one(whole.layers, i), adapters)
  norm = whole.norm
  if "norm" in tree.outer:
    norm = tree.outer["norm"].merge(norm)
  hidden = decoder.layers_lib.rms_norm(carry[0], norm, CONFIG.norm_eps)
  found = np.asarray(decoder.unembed(CONFIG, base, tree, hidden))
  found = found[data.tokens >= 0].reshape(2, 12, -1)
  assert tiny.distance(found, contract.logits(base, tree)) < 2e-6


@adapting
def test_the_count_is_that_of_the_formula(method):
  _, tree = contract.built(method, base_format(method))
  row, config = ROWS[method], registry.checked(contract.block(method))
  placements = assemble.placements(tree)
  expected = registry.shared_count(
      row, config.options, rank=4, geometry=contract.GEOMETRY,
      modules=sum((p.rank > 0).sum() for p in placements.values()))
  shapes = tiny.shapes(CONFIG)
  for name, placed in placements.items():
    for turn, rank in enumerate(placed.rank[placed.rank > 0]):
      expected += registry.count(
          row, config.options, name, shapes[name], int(rank),
          contract.GEOMETRY, turn)
  assert adapters_lib.trainable_size(tree) == expected > 0


@each
def test_split_and_join_are_inverse(method):
  _, tree = contract.built(method, base_format(method))
  trainable, frozen = adapters_lib.split(tree)
  joined = adapters_lib.join(trainable, frozen)
  assert jax.tree.structure(joined) == jax.tree.structure(tree)
  both = trees.size(trainable) + trees.size(frozen)
  assert both == trees.size(tree)


@adapting
def test_layers_that_are_not_chosen_are_the_base(method):
  if ROWS[method].sites == ("prompt",):
    return  # The input is of no layer.
  base, tree = adapters_lib.build(
      jax.random.key(1), contract.block(
          method, layers="0,2", rank_pattern={}),
      contract.quantised(base_format(method)), tiny.paths(CONFIG),
      geometry=contract.GEOMETRY)
  placed = assemble.placements(tree)
  for name in tree.layers:
    assert (placed[name].rank > 0).tolist() == [True, False, True]
  tree = tiny.mask(contract.moved(tree))
  # Where a layer is not adapted, whatever stands there has no gradient.
  trainable, frozen = adapters_lib.split(tree)
  _, grads = contract.gradient(
      trainable, frozen, base, contract.stacked(contract.batch_of(tree)),
      jax.random.key(0))
  for path, leaf in trees.paths(grads.layers).items():
    used = np.abs(leaf).reshape(3, -1).max(1) > 0
    last = path.split(".")[-1] not in ROWS[method].carried
    assert used.tolist() == [True, False, last], path


@some
def test_dropout_depends_on_step_example_and_position_alone(method):
  base, tree = contract.randomised(method, "none")
  tree = adapters_lib.with_rate(tree, 0.5)
  trainable, frozen = adapters_lib.split(tree)
  run = functools.partial(
      contract.gradient, trainable, frozen, base, noise=True)
  data, key = contract.batch_of(tree), jax.random.key(3)
  value, grads = run(contract.stacked(data), key)
  again, _ = run(contract.stacked(data), key)
  assert value == again
  # The same rows in another order, and as two micro-batches of one row.
  swapped, _ = run(
      contract.stacked(jax.tree.map(lambda x: x[::-1], data)), key)
  split, split_grads = run(jax.tree.map(lambda x: x[:, None], data), key)
  np.testing.assert_allclose([swapped, split], [value] * 2, rtol=1e-6)
  for path, leaf in trees.paths(grads).items():
    other = trees.paths(split_grads)[path]
    scale = np.abs(leaf).max() + 1e-12
    assert np.abs(leaf - other).max() / scale < 1e-5, path
  other_step, _ = run(contract.stacked(data), jax.random.key(4))
  drops = any(hasattr(a, "rate") for a in jax.tree.leaves(
      tree, is_leaf=partition.is_adapter))
  assert (abs(other_step - value) > 1e-4) == drops


@some
def test_a_bf16_step_stays_finite(method):
  base, tree = contract.randomised(method, base_format(method))
  trainable, frozen = adapters_lib.split(tree)
  data = contract.stacked(contract.batch_of(tree))
  value, grads = contract.gradient(
      trainable, frozen, base, data, jax.random.key(0), dtype="bfloat16")
  exact, _ = contract.gradient(
      trainable, frozen, base, data, jax.random.key(0))
  assert abs(value - exact) < 0.05
  for path, leaf in trees.paths(grads).items():
    assert leaf.dtype == jnp.float32 and np.isfinite(leaf).all(), path


def test_padding_of_a_smaller_rank_stays_zero():
  base, tree = contract.built("lora", "none")
  trainable, frozen = adapters_lib.split(tree)
  _, grads = contract.gradient(
      trainable, frozen, base, contract.stacked(contract.batch()),
      jax.random.key(0))
  up = grads.layers["up_proj"]
  assert not np.any(up.a[1, :, 2:]) and not np.any(up.b[1, 2:])
  assert np.any(up.b[1, :2]) and np.any(up.b[0, 2:])
