"""LoHa: both ways to multiply, against PEFT, and its dropout."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax.adapters import loha
from lora_jax.adapters import pieces
from lora_jax.adapters import registry
from tests import tiny
from tests.adapters import against

peft = pytest.importorskip("peft")


@pytest.mark.parametrize(("rank", "joined"), [(2, True), (5, False)])
def test_it_is_pefts(rank, joined):
  config = peft.LoHaConfig(r=rank, alpha=3, target_modules=["q_proj"])
  adapter, _ = against.check("loha", config, 12, 20)
  factors = adapter.factors()
  assert (factors is not None) == joined
  if joined:
    assert factors[0].shape == (12, 4)
    assert tiny.distance(factors[0] @ factors[1], adapter.delta()) < 1e-6


def test_concrete_numbers():
  """(A1 B1) * (A2 B2) = [[2, 4]] * [[3, -1]] = [[6, -4]], of one row."""
  one = lambda *rows: jnp.asarray(rows, jnp.float32)
  adapter = loha.LoHa(
      a1=one([1.0, 1.0]), b1=one([1.0, 1.0], [1.0, 3.0]),
      a2=one([1.0, 0.0]), b2=one([3.0, -1.0], [9.0, 9.0]),
      scale=0.5, rate=0.0, rank=2)
  assert adapter.delta().tolist() == [[3.0, -2.0]]
  # The padding of rank 1 is out: 0.5 [[1, 1]] * [[3, -1]].
  assert adapter.replace(rank=1).delta().tolist() == [[1.5, -0.5]]


def test_dropout_leaves_whole_outputs_and_scales_the_rest():
  config = peft.LoHaConfig(
      r=2, alpha=3, target_modules=["q_proj"], rank_dropout=0.5,
      module_dropout=0.25)
  adapter, there = against.check("loha", config, 12, 20)
  assert adapter.module_rate == 0.25 and adapter.rate == 0.5
  assert registry.checked(adapters_lib.AdapterConfig(
      method="loha", options=loha.Options(0.25))).options.module_dropout == 0.25
  base = there.x @ there.weight
  added = adapter.down_up(jnp.asarray(there.x))
  idle = 0

  @jax.jit
  def run(key):
    ids = jnp.zeros((2, 3), jnp.int32)
    return adapter.apply(
        jnp.asarray(there.x), there.weight, adapters_lib.Noise(key, ids, ids))

  for seed in range(40):
    gain = np.median((run(jax.random.key(seed)) - base) / added, (0, 1))
    kept = gain > 0.1
    idle += not kept.any()
    if kept.any():
      np.testing.assert_allclose(gain[kept], 20 / kept.sum(), rtol=1e-3)
    np.testing.assert_allclose(gain[~kept], 0, atol=1e-3)
  assert 3 <= idle <= 20


def test_padding_has_no_gradient_and_its_start_counts_the_rank_alone():
  config = peft.LoHaConfig(r=3, target_modules=["q_proj"])
  slot = against.slot("loha", config, 12, 20).replace(rank=np.int32(2))
  weight = jnp.ones((12, 20))
  adapter = loha.init(jax.random.key(0), weight, slot)
  assert 0.5 ** 0.5 - 0.05 < jnp.abs(adapter.b1).max() <= 0.5 ** 0.5
  adapter = adapter.replace(a2=adapter.a1)
  grads = jax.grad(lambda a: jnp.sum(jnp.sin(a.apply(
      jnp.ones((1, 12)), weight))), allow_int=True)(adapter)
  for name, axis in (("a1", 1), ("a2", 1), ("b1", 0), ("b2", 0)):
    first, last = jnp.split(getattr(grads, name), [2], axis)
    assert jnp.any(first != 0) and not jnp.any(last), name
  assert set(adapter.to_peft()) == {
      f"hada_w{n}_{c}" for n in (1, 2) for c in "ab"}
  assert pieces.used(3, 2).tolist() == [1, 1, 0]


def test_a_bad_rate_is_named():
  with pytest.raises(errors.UsageError, match=r"module_dropout=1.0 is out"):
    registry.checked(adapters_lib.AdapterConfig(
        method="loha", options={"module_dropout": 1.0}))
