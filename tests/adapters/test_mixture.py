"""Mixtures of LoRAs, by hand."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax.adapters import mixture
from lora_jax.adapters import several
from lora_jax.export import hf as hf_export
from tests import tiny
from tests.adapters import contract

I, O, K, R = 5, 4, 3, 2


def draw(top=0, rank=R):
  rng = np.random.default_rng(0)
  a, b, router, w, x = (
      jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in (
          (K, I, R), (K, R, O), (I, K), (I, O), (2, 3, I)))
  return mixture.Mixture(
      a=a, b=b, router=router, scale=jnp.float32(1.5), rate=jnp.float32(0),
      rank=jnp.int32(rank), top=top), w, x


def by_hand(m, w, x, top):
  """h of one token after the other."""
  found = []
  for token in np.asarray(x, np.float64).reshape(-1, I):
    logits = token @ np.asarray(m.router, np.float64)
    chosen = np.argsort(-logits)[:top]
    weights = np.exp(logits[chosen]) / np.exp(logits[chosen]).sum()
    h = token @ np.asarray(w, np.float64)
    for g, k in zip(weights, chosen):
      h = h + 1.5 * g * (token @ np.asarray(m.a[k])) @ np.asarray(m.b[k])
    found.append(h)
  return np.reshape(found, (2, 3, O))


@pytest.mark.parametrize("top", [0, 1, 2])
def test_every_token_has_experts_of_its_own(top):
  m, w, x = draw(top)
  np.testing.assert_allclose(
      m.apply(x, w), by_hand(m, w, x, top or K), rtol=1e-5, atol=1e-5)
  gates = np.asarray(m.gates(x))
  np.testing.assert_allclose(gates.sum(-1), 1, rtol=1e-6)
  assert ((gates > 0).sum(-1) == (top or K)).all()
  # Not all tokens choose alike, or there were nothing to choose.
  assert len({row.argmax() for row in gates.reshape(-1, K)}) > 1


def test_a_router_of_zeros_is_one_lora():
  """Its experts side by side, each with its K-th."""
  m, w, x = draw()
  m = dataclasses.replace(m, router=0 * m.router)
  one = adapters_lib.METHODS["lora"].adapter(
      a=jnp.concatenate(m.a, 1), b=jnp.concatenate(m.b, 0),
      scale=m.scale / K, rate=m.rate, rank=jnp.int32(K * R))
  assert tiny.distance(m.apply(x, w), one.apply(x, w)) < 1e-6
  # Without experts, what remains of them is padding.
  none = dataclasses.replace(m, rank=jnp.int32(0))
  np.testing.assert_array_equal(none.apply(x, w), x @ w)


def test_where_it_starts_and_what_moves_first():
  _, tree = adapters_lib.build(
      jax.random.key(0), adapters_lib.AdapterConfig(
          method="mixture", rank=4, targets="up_proj",
          options={"experts": 8}), contract.quantised("none"),
      tiny.paths(contract.CONFIG), geometry=contract.GEOMETRY)
  m = tree.layers["up_proj"]
  assert m.a.shape == (3, 8, 32, 4) and not np.any(m.b)
  bound = 32 ** -0.5
  assert 0.95 * bound < np.abs(m.a).max() <= bound
  assert (m.a[:, 0] != m.a[:, 1]).any()
  np.testing.assert_allclose(np.std(m.router), 0.02, rtol=0.1)
  assert adapters_lib.trainable_size(tree) == 3 * 8 * (4 * (32 + 48) + 32)


def test_it_is_no_weight():
  m, w, _ = draw()
  with pytest.raises(errors.UserError, match="use --format=peft"):
    m.merge(w)
  base, tree = adapters_lib.build(
      jax.random.key(0), contract.block(
          "mixture", targets="q_proj", rank_pattern={}),
      contract.quantised("none"), tiny.paths(contract.CONFIG),
      geometry=contract.GEOMETRY)
  _, tensors = hf_export.merged(contract.CONFIG, base, tree)
  with pytest.raises(errors.UserError, match="use --format=peft"):
    list(tensors)
  # DoRA asks what it decomposes for its norms: it can only stand before.
  pair = [contract.block(name, targets="q_proj", rank_pattern={})
          for name in ("dora", "mixture")]
  _, tree = adapters_lib.build(
      jax.random.key(0), pair, base, tiny.paths(contract.CONFIG),
      geometry=contract.GEOMETRY)
  assert several.before(tree, "dora", ["mixture"]) is None
  with pytest.raises(errors.UserError, match="stand before a method"):
    adapters_lib.build(
        jax.random.key(0), pair[::-1], base, tiny.paths(contract.CONFIG),
        geometry=contract.GEOMETRY)


@pytest.mark.parametrize("options, message", [
    ({"experts": 1}, "adapter.options.experts=1 is out of range"),
    ({"experts": 3, "top": 4}, "adapter.options.top=4 is out of range"),
])
def test_options_that_cannot_be(options, message):
  with pytest.raises(errors.UsageError, match=message):
    adapters_lib.METHODS["mixture"].options(**options).validate()
