"""Bottleneck adapters by hand: values, where they stand, dropout, ranks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax.adapters import bottleneck
from lora_jax.adapters import registry
from lora_jax.export import peft as peft_export
from lora_jax.models import decoder
from lora_jax.models import modules
from tests import tiny
from tests.adapters import contract

D = 2


def one(cls=bottleneck.Bottleneck, activation="relu", rank=2, rate=0.0,
        scale=1.0):
  """d = 2, r = 2, and a third, unused column of weights."""
  return cls(
      down=jnp.asarray([[1.0, -1, 7], [2, 1, 7]]),
      down_bias=jnp.asarray([0.5, -2, 7]),
      up=jnp.asarray([[3.0, 0], [1, -1], [7, 7]]),
      up_bias=jnp.asarray([0.25, 1]), scale=jnp.float32(scale),
      rate=jnp.float32(rate), rank=jnp.int32(rank), activation=activation)


def test_a_hand_computed_example():
  """y D + d = (1 + 4 + .5, -1 + 2 - 2) = (5.5, -1), of which relu keeps 5.5."""
  x, y = jnp.asarray([[[9.0, 9]]]), jnp.asarray([[[1.0, 2]]])
  after = one().residual(x, y)
  np.testing.assert_allclose(after[0, 0], [1 + 16.5 + 0.25, 2 + 1])
  beside = one(bottleneck.Parallel, scale=4.0).residual(y, x)
  np.testing.assert_allclose(beside[0, 0], [9 + 4 * 16.75, 9 + 4])
  # Of the first column alone, and of none: the block itself.
  first = one(rank=1).residual(x, -y)
  np.testing.assert_allclose(first[0, 0], [-1 + 0.25, -2 + 1])
  np.testing.assert_array_equal(one(rank=0).residual(x, y), y)


@pytest.mark.parametrize("name,value", [
    ("relu", [5.5, 0]), ("tanh", [np.tanh(5.5), np.tanh(-1)]),
    ("silu", [5.5 / (1 + np.exp(-5.5)), -1 / (1 + np.e)]),
    ("gelu", [5.4999999, -0.158808])])
def test_activations(name, value):
  y = jnp.asarray([[[1.0, 2]]])
  found = one(activation=name).residual(y, y) - y
  up = np.asarray([[3.0, 0], [1, -1]])
  np.testing.assert_allclose(
      found[0, 0], value @ up + [0.25, 1], atol=1e-5)


def test_dropout_is_of_what_enters():
  y = jnp.ones((4, 50, D))
  noise = adapters_lib.Noise(
      jax.random.key(0), jnp.broadcast_to(jnp.arange(4)[:, None], (4, 50)),
      jnp.broadcast_to(jnp.arange(50), (4, 50)))
  found = np.asarray(one(rate=0.5).residual(y, y, noise))
  kept = [one().residual(y, x * y) - x * y + y for x in (
      jnp.asarray([0.0, 0]), jnp.asarray([2.0, 0]), jnp.asarray([0.0, 2]),
      jnp.asarray([2.0, 2]))]
  rows = np.stack([k[0, 0] for k in kept])
  which = np.abs(found[:, :, None] - rows).max(-1)
  assert which.min(-1).max() < 1e-5
  share = np.bincount(which.argmin(-1).ravel(), minlength=4) / 200
  assert np.abs(share - 0.25).max() < 0.1
  # At evaluation there is none.
  np.testing.assert_array_equal(one(rate=0.5).residual(y, y),
                                one().residual(y, y))


@pytest.mark.parametrize("method,blocks", [
    ("houlsby", ("self_attn", "mlp")), ("pfeiffer", ("mlp",)),
    ("parallel", ("mlp",))])
def test_where_they_stand_and_where_they_start(method, blocks):
  _, tree = contract.built(method, "none")
  assert set(tree.layers) == set(blocks)
  for adapter in tree.layers.values():
    assert not np.any(adapter.up) and not np.any(adapter.up_bias)
    assert abs(float(np.std(adapter.down)) - 0.02) < 0.003
    assert adapter.scale.tolist() == [4.0 if method == "parallel" else 1.0] * 3


def test_the_parallel_one_reads_the_normed_input():
  """Beside an MLP that gives nothing it is a function of its input."""
  _, tree = contract.built("parallel", "none")
  tree = contract.moved(tree)
  config, base = contract.CONFIG, contract.quantised("none")
  weights = contract.one(base.layers, 0)
  down = weights["down_proj"]
  weights |= {"down_proj": down.replace(weight=0 * down.weight)}
  adapter = contract.one(tree.layers["mlp"], 0)
  data = contract.batch()
  context = decoder.Context(
      *decoder.rope.tables(config.rope, config.head_dim, data.positions),
      data.positions, data.segment_ids, data.positions, data.segment_ids)
  hidden = jax.random.normal(jax.random.key(0), (2, 12, 32))
  with_it, without = (
      decoder.layer(config, context, hidden, weights, adapters)[0]
      for adapters in ({"mlp": adapter}, {}))
  normed = decoder.layers_lib.rms_norm(
      without, weights["post_attention_layernorm"], config.norm_eps)
  expected = without + adapter.residual(normed, 0 * normed)
  assert tiny.distance(with_it, expected) < 1e-5


def test_layers_may_have_bottlenecks_of_their_own(tmp_path):
  block = contract.block(
      "houlsby", rank_pattern={"layers.1.mlp": 2, "layers.2.self_attn": 6},
      dropout=0.1)
  base, paths = contract.quantised("none"), modules.paths(contract.CONFIG)
  _, tree = adapters_lib.build(
      jax.random.key(0), block, base, paths, geometry=contract.GEOMETRY)
  assert tree.layers["mlp"].rank.tolist() == [4, 2, 4]
  assert tree.layers["self_attn"].down.shape == (3, 32, 6)
  tree = contract.moved(tree)
  expected = sum(2 * r * 32 + r + 32 for r in (4, 2, 4, 4, 4, 6))
  assert adapters_lib.trainable_size(tree) == expected
  # Nothing reads the padding, which has no gradient, and files leave it out.
  data = contract.stacked(contract.batch())
  trainable, frozen = adapters_lib.split(tree)
  _, grads = contract.gradient(
      trainable, frozen, base, data, jax.random.key(0))
  mlp = grads.layers["mlp"]
  assert np.any(mlp.down[1, :, :2]) and not np.any(mlp.down[1, :, 2:])
  assert not np.any(mlp.up[1, 2:]) and not np.any(mlp.down_bias[1, 2:])
  config = peft_export.peft_config(registry.checked(block), tree, paths)
  peft_export.write(tmp_path / "a", tree, config, paths)
  loaded = peft_export.read(
      tmp_path / "a", paths, modules.shapes(contract.CONFIG),
      geometry=contract.GEOMETRY)
  assert loaded.config.rank_pattern == block.rank_pattern
  assert loaded.adapters.layers["mlp"].rank.tolist() == [4, 2, 4]
  np.testing.assert_array_equal(
      contract.logits(base, loaded.adapters), contract.logits(base, tree))


def test_an_unknown_activation_is_refused():
  with pytest.raises(errors.UsageError, match=r"options\.activation"):
    registry.checked(
        contract.block("houlsby", options={"activation": "rely"}))


def test_published_count():
  """Houlsby's 2 L (2 d b + b + d): BERT-large, bottleneck 64."""
  g = adapters_lib.Geometry(
      d=1024, f=4096, h=16, k=16, e=64, l=24, v=30522)
  a_block = registry.count(
      bottleneck.HOULSBY, bottleneck.Options(), "mlp", (), 64, g)
  assert 2 * 24 * a_block == 2 * 24 * (2 * 1024 * 64 + 64 + 1024) == 6_343_680
