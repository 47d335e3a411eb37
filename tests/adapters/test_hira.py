"""HiRA against PEFT, embeddings too, and its padding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.adapters import hira
from lora_jax.adapters import starts
from tests import tiny
from tests.adapters import against

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")


def config(**options):
  return peft.HiraConfig(target_modules=["q_proj"], **options)


def test_it_is_pefts():
  adapter, there = against.check("hira", config(r=3, hira_dropout=0.1), 12, 20)
  assert adapter.rate == np.float32(0.1)
  assert against.start_distance("hira", config(r=3), 12, 20) == 0
  # A change of up to r times W0's rank, not of rank 3.
  delta = adapter.delta(jnp.asarray(there.weight))
  assert np.linalg.matrix_rank(delta) == 12


def test_pefts_files_are_read_although_it_ignores_its_rank_pattern():
  """PEFT 0.21.2 documents `rank_pattern` and makes every rank r."""
  _, there = against.check(
      "hira", config(r=3, rank_pattern={"q_proj": 2}), 12, 20)
  assert there.tensors["hira_A"].shape == (3, 12)


def test_concrete_numbers():
  """W0 * (A B) = [[1, 2], [3, 4]] * [[5, 6], [10, 12]]."""
  one = lambda *rows: jnp.asarray(rows, jnp.float32)
  adapter = hira.HiRA(a=one([1], [2]), b=one([5, 6]), rate=0.0, rank=1)
  weight = one([1, 2], [3, 4])
  np.testing.assert_array_equal(adapter.delta(weight), [[5, 12], [30, 48]])
  np.testing.assert_array_equal(
      adapter.apply(one([1, 1]), weight), [[4 + 35, 6 + 60]])


def test_embeddings_are_pefts():
  from peft.tuners.hira import layer

  torch.manual_seed(0)
  table = torch.nn.Embedding(9, 6)
  module = layer.Embedding(table, "default", config(r=2), r=2)
  for values in (module.hira_embedding_A, module.hira_embedding_B):
    torch.nn.init.normal_(values["default"])
  tokens = torch.tensor([[3, 0, 8]])
  expected = module(tokens).detach().numpy()
  tensors = {name: getattr(module, name)["default"].detach().numpy()
             for name in ("hira_embedding_A", "hira_embedding_B")}
  slot = against.slot("hira", config(r=2), 9, 6).replace(target="embed_tokens")
  adapter = hira.HiRA.from_peft(tensors, slot)
  weight = jnp.asarray(table.weight.detach().numpy())
  assert tiny.distance(
      adapter.lookup(jnp.asarray(tokens.numpy()), weight), expected) < 1e-6
  module.merge()
  assert tiny.distance(
      adapter.merge(weight), table.weight.detach().numpy()) < 1e-6
  for name, value in adapter.to_peft(embedding=True).items():
    np.testing.assert_array_equal(value, tensors[name])
  fresh = hira.init(jax.random.key(0), weight, slot)
  assert not np.any(fresh.a) and np.all(fresh.b != 0)


def test_the_gaussian_start_has_the_deviation_of_its_rank():
  slot = against.slot("hira", config(r=4), 400, 6).replace(
      start=starts.choose("gaussian"))
  fresh = hira.init(jax.random.key(0), jnp.ones((400, 6)), slot)
  np.testing.assert_allclose(np.std(fresh.a), 1 / 4, rtol=0.05)


def test_padding_has_no_effect_and_no_gradient():
  slot = against.slot("hira", config(r=3), 12, 20).replace(rank=np.int32(2))
  key = jax.random.key(0)
  weight = jax.random.normal(key, (12, 20))
  full = hira.HiRA(
      a=jax.random.normal(key, (12, 3)), b=jax.random.normal(key, (3, 20)),
      **slot.values("rate", "rank"))
  grads = jax.grad(lambda a: jnp.sum(jnp.sin(a.apply(
      jnp.ones((1, 12)), weight))), allow_int=True)(full)
  assert jnp.any(grads.a[:, :2]) and not jnp.any(grads.a[:, 2])
  assert jnp.any(grads.b[:2]) and not jnp.any(grads.b[2])
  np.testing.assert_allclose(
      full.delta(weight), weight * (full.a[:, :2] @ full.b[:2]), rtol=1e-5,
      atol=1e-6)
