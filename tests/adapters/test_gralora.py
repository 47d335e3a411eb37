"""GraLoRA against PEFT, hybrid too, and what its blocks are."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax.adapters import gralora
from lora_jax.adapters import registry
from tests import tiny
from tests.adapters import against

peft = pytest.importorskip("peft")


def config(**options):
  return peft.GraloraConfig(target_modules=["q_proj"], alpha=3, **options)


@pytest.mark.parametrize("options", [
    {"r": 4}, {"r": 4, "gralora_k": 4, "gralora_dropout": 0.1},
    {"r": 2, "hybrid_r": 3}, {"r": 3, "gralora_k": 1},
], ids=["two", "four", "hybrid", "one"])
def test_it_is_pefts(options):
  adapter, there = against.check("gralora", config(**options), 12, 20)
  assert against.start_distance("gralora", config(**options), 12, 20) == 0
  a, b = adapter.factors()
  x = jnp.asarray(there.x)
  assert tiny.distance(x @ a @ b, adapter.down_up(x)) < 1e-5
  fresh = gralora.init(
      jax.random.key(0), jnp.asarray(there.weight),
      against.slot("gralora", config(**options), 12, 20)).to_peft()
  for name, value in there.start.items():
    ours, theirs = np.abs(fresh[name]).max(), np.abs(value).max()
    assert (ours == 0) == (theirs == 0), name
    assert theirs == 0 or 0.6 < ours / theirs < 1.7, name


def test_a_block_is_part_j_of_a_n_times_part_n_of_b_j():
  adapter, _ = against.check("gralora", config(r=4), 12, 20)
  delta = adapter.merge(jnp.zeros((12, 20)))
  scale = 3 / 4
  for n in range(2):
    for j in range(2):
      block = scale * (adapter.a[n][:, 2 * j:2 * j + 2]
                       @ adapter.b[j][2 * n:2 * n + 2])
      np.testing.assert_allclose(
          delta[6 * n:6 * n + 6, 10 * j:10 * j + 10], block, atol=1e-5)
  # Twice the rank that as many parameters are in LoRA.
  assert np.linalg.matrix_rank(delta) == 8


@pytest.mark.parametrize(("options", "message"), [
    ({"gralora_k": 3}, r"gralora_k=3 does not divide adapter.rank=4 and 12"),
    ({"gralora_k": 0}, r"gralora_k=0 is out of range"),
    ({"hybrid_r": -1}, r"hybrid_r=-1 is out of range"),
])
def test_what_does_not_fit_is_named(options, message):
  with pytest.raises(errors.UsageError, match=message):
    checked = registry.checked(adapters_lib.AdapterConfig(
        method="gralora", options=options))
    slot = against.slot("gralora", config(r=4), 12, 20).replace(
        options=checked.options)
    gralora.init(jax.random.key(0), jnp.ones((12, 20)), slot)
