"""MiSS and its variants, against PEFT."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax.adapters import miss
from lora_jax.adapters import registry
from tests import tiny
from tests.adapters import against

peft = pytest.importorskip("peft")


@pytest.mark.parametrize(("options", "i", "o"), [
    ({"r": 4}, 12, 20),
    ({"r": 5, "miss_dropout": 0.1}, 12, 20),  # The last shard is short.
    ({"r": 12}, 12, 20),
    ({"r": 5, "init_weights": "mini", "mini_r": 4}, 12, 20),
    ({"r": 4, "init_weights": "bat"}, 12, 20),
    ({"r": 4, "init_weights": "bat"}, 20, 12),
], ids=["even", "padded", "one", "mini", "bat", "bat-down"])
def test_it_is_pefts(options, i, o):
  config = peft.MissConfig(target_modules=["q_proj"], **options)
  adapter, there = against.check("miss", config, i, o)
  assert against.start_distance("miss", config, i, o) == 0
  row = registry.method("miss")
  written = row.form.config(registry.checked(adapters_lib.AdapterConfig(
      method="miss", **row.form.block(config.to_dict()))))
  assert written.items() <= config.to_dict().items()
  if options.get("init_weights") == "bat":
    assert adapter.factors() is None
  else:
    a, b = adapter.factors()
    assert tiny.distance(
        there.x @ a @ b, adapter.down_up(jnp.asarray(there.x))) < 1e-5


def test_concrete_numbers():
  """r = 2, x = (1, 2, 3): shards (1, 2) and (3, 0) add up to (4, 2)."""
  one = lambda *rows: jnp.asarray(rows, jnp.float32)
  adapter = miss.MiSS(
      block=one([1, 10], [100, 1000]), rate=0.0, rank=2, shape=(3, 2))
  assert adapter.down_up(one([1, 2, 3])).tolist() == [[204, 2040]]
  assert adapter.merge(jnp.zeros((3, 2))).tolist() == [
      [1, 10], [100, 1000], [1, 10]]
  # Bat of one block of one: W + d (W + 1).
  bat = miss.Bat(block=one([[2]]), rank=1)
  assert bat.merge(one([3])).tolist() == [[11]]


def test_bats_gradient_is_that_of_the_merged_weight():
  config = peft.MissConfig(
      target_modules=["q_proj"], r=4, init_weights="bat")
  adapter, there = against.check("miss", config, 12, 20)
  x = jnp.asarray(there.x)

  def loss(block, merged):
    new = adapter.replace(block=block)
    y = (x @ new.merge(there.weight) if merged
         else new.apply(x, there.weight))
    return jnp.sum(jnp.sin(y))

  found, expected = (jax.grad(loss)(adapter.block, m) for m in (False, True))
  assert tiny.distance(found, expected) < 1e-5
  assert np.abs(expected).max() > 0.1


@pytest.mark.parametrize(("rank", "options", "message"), [
    (5, {"init_weights": "bat"}, r"adapter.rank=5 does not divide 12 x 20"),
    (4, {"init_weights": "mini", "mini_r": 3}, r"mini_r=3 does not divide"),
    (13, {}, r"adapter.rank=13 is more than the 12 inputs"),
    (4, {"init_weights": "bait"}, r'init_weights.*"bat"|init_weights.*bat'),
    (4, {"mini_r": 0}, r"mini_r=0 is out of range"),
])
def test_what_does_not_fit_is_named(rank, options, message):
  with pytest.raises(errors.UsageError, match=message):
    checked = registry.checked(adapters_lib.AdapterConfig(
        method="miss", rank=rank, options=options))
    slot = against.slot(
        "miss", peft.MissConfig(r=4), 12, 20).replace(
            width=rank, options=checked.options)
    miss.init(jax.random.key(0), jnp.ones((12, 20)), slot)
