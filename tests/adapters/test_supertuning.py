"""Super-Tuning by hand, and Supra against PEFT's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import errors
from lora_jax.adapters import base as base_lib
from lora_jax.adapters import supertuning
from tests.adapters import against

W = np.float32([[1, -6], [2, 3], [-5, 4]])


def made(**options):
  slot = base_lib.Slot(
      np.int32(1), np.float32(1), np.float32(0), target="q_proj",
      options=supertuning.Options(**options))
  return supertuning.init(jax.random.key(0), jnp.asarray(W), slot)


@pytest.mark.parametrize("top, changed", [
    (True, [[1, 4], [2, 3], [15, 4]]), (False, [[11, -6], [22, 3], [-5, 4]])])
def test_the_largest_or_the_smallest_entries_are_trained(top, changed):
  """6 entries, of which int(6 (1 - 0.6)) = 2 are trained: -6 and -5, or 1 and
  2; the first gets 10, the second 20."""
  adapter = made(sparsity=0.6, select_top=top)
  assert adapter.values.tolist() == [0, 0]
  adapter = adapter.replace(values=np.float32([10, 20]))
  np.testing.assert_array_equal(adapter.merge(W), changed)
  x = np.float32([[1, 10, 100]])
  np.testing.assert_array_equal(adapter.apply(x, W), x @ np.float32(changed))


def test_nothing_left_to_train_is_refused():
  with pytest.raises(errors.UsageError, match=r"sparsity=0.9 leaves none of"):
    made(sparsity=0.9)


@pytest.mark.parametrize("options", [
    {}, {"select_top": False}, {"r": 2}, {"r": 2, "lora_alpha": 3.0}])
def test_it_is_that_of_peft(options):
  peft = pytest.importorskip("peft")
  adapter, there = against.check("supertuning", peft.SupertuningConfig(
      sparsity=0.8, target_modules=["q_proj"], **options), 12, 8)
  # The same entries as PEFT takes.
  fresh = supertuning.init(
      jax.random.key(0), jnp.asarray(there.weight), base_lib.Slot(
          np.int32(1), np.float32(1), np.float32(0), target="q_proj",
          options=supertuning.Options(
              0.8, options.get("select_top", True), options.get("r", 0))))
  np.testing.assert_array_equal(fresh.index, adapter.index)


def test_dropout_is_of_the_low_rank_part_alone():
  plain = made(sparsity=0.6).replace(values=np.float32([10, 20]))
  adapter = supertuning.Supra(
      values=plain.values, index=plain.index, rank=plain.rank, shape=(3, 2),
      a=np.ones((3, 1), np.float32), b=np.float32([[1, -1]]),
      scale=np.float32(2), rate=np.float32(1 - 1e-6))

  class Nothing:
    def dropout(self, x, rate):
      assert rate > 0.9
      return 0 * x

  x = np.float32([[1, 10, 100]])
  np.testing.assert_array_equal(
      adapter.apply(x, W, Nothing()), plain.apply(x, W))
  np.testing.assert_array_equal(
      adapter.apply(x, W), plain.apply(x, W) + np.float32([[222, -222]]))
