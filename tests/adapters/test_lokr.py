"""LoKr: its factorisation and its forms, against PEFT."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import errors
from lora_jax.adapters import config as config_lib
from lora_jax.adapters import lokr
from lora_jax.adapters import registry
from tests import tiny
from tests.adapters import against

peft = pytest.importorskip("peft")


def test_sizes_are_factorised_as_peft_does():
  from peft.tuners.lokr import layer

  for size in (1, 2, 12, 31, 36, 48, 49, 128, 11008):
    for factor in (-1, 1, 4, 5, 8, 16, 100):
      assert lokr.factorised(size, factor) == layer.factorization(
          size, factor), (size, factor)


# 24 is 4 x 6 and 40 is 5 x 8; 3 x 8 and 1 x 40 by a factor of 3.
@pytest.mark.parametrize(("options", "names"), [
    ({"r": 4}, {"w1", "w2"}),
    ({"r": 3}, {"w1", "w2_a", "w2_b"}),
    ({"r": 2, "decompose_both": True}, {"w1_a", "w1_b", "w2_a", "w2_b"}),
    ({"r": 20, "decompose_factor": 3}, {"w1", "w2"}),
    ({"r": 7, "decompose_factor": 8, "rank_dropout": 0.1,
      "rank_dropout_scale": True, "module_dropout": 0.2,
      "init_weights": "lycoris"}, {"w1", "w2"}),
], ids=["whole", "second", "both", "factor", "lycoris"])
def test_it_is_pefts(options, names):
  config = peft.LoKrConfig(target_modules=["q_proj"], alpha=3, **options)
  adapter, there = against.check("lokr", config, 24, 40)
  assert set(there.tensors) == {f"lokr_{n}" for n in names}
  assert against.start_distance("lokr", config, 24, 40) == 0
  fresh = lokr.init(
      jax.random.key(0), there.weight,
      against.slot("lokr", config, 24, 40)).to_peft()
  for name, value in there.start.items():
    ours, theirs = np.abs(fresh[name]).max(), np.abs(value).max()
    assert (ours == 0) == (theirs == 0), name
    # Of a uniform distribution, the largest of at least a dozen.
    assert theirs == 0 or 0.6 < ours / theirs < 1.7, name
  row = registry.method("lokr")
  block = row.form.block(config.to_dict())
  written = row.form.config(registry.checked(config_lib.AdapterConfig(
      method="lokr", **block)))
  assert written.items() <= config.to_dict().items()
  assert adapter.rate == np.float32(options.get("rank_dropout", 0))


def test_concrete_numbers():
  """x (W1 (x) W2) with W1 = [1 2], W2 = [3; 4]: rows 3 (1 2) and 4 (1 2)."""
  one = lambda *rows: jnp.asarray(rows, jnp.float32)
  adapter = lokr.LoKr(
      scale=2.0, rate=0.0, rank=1, w1=one([1, 2]), w2=one([3], [4]))
  np.testing.assert_array_equal(
      adapter.merge(jnp.zeros((2, 2))), [[6, 12], [8, 16]])
  assert tiny.distance(
      adapter.down_up(one([1, 10])), one([86, 172])) == 0
  idle = adapter.replace(rank=0)
  assert not np.any(idle.down_up(one([1, 10])))


def test_patterns_and_starts_that_are_not_there_are_refused():
  with pytest.raises(errors.UsageError, match=r"init_weights.*lycoris"):
    registry.checked(config_lib.AdapterConfig(
        method="lokr", options={"init_weights": "lycori"}))
  assert not registry.method("lokr").patterns
