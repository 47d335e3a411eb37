"""PEANuT by hand, and PEFT's variants of it."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax.adapters import peanut
from lora_jax.adapters import registry
from tests.adapters import against


def test_a_network_of_the_weight_by_hand():
  w = np.float32([[1, -2], [3, 1]])
  adapter = peanut.Peanut(
      a=np.float32([[1], [1]]), b=np.float32([[2, -1]]),
      scale=np.float32(0.5), rank=np.int32(1),
      encoders=np.float32([[[-2]]]), decoders=np.float32([[[3]]]))
  # W A = (-1, 4), relu: (0, 4). Encoded: relu(0, -8) = (0, 0). Decoded: 0,
  # plus what the encoder read: (0, 4) = H. Times B: rows (0, 0), (8, -4).
  np.testing.assert_array_equal(adapter.hidden(w), [[0], [4]])
  np.testing.assert_array_equal(adapter.merge(w), [[1, -2], [7, -1]])
  x = np.float32([[1, 10]])
  np.testing.assert_array_equal(adapter.apply(x, w), [[71, -12]])
  prepared = adapter.prepared(jnp.asarray(w))
  a, b = prepared.factors()
  np.testing.assert_array_equal(x @ w + (x @ a) @ b, [[71, -12]])
  assert adapter.factors() is None


@pytest.mark.parametrize("options", [
    {}, {"depth": 2, "act_fn": "silu", "scaling": 0.5},
    {"depth": 1, "act_fn": "gelu"}, {"act_fn": "gelu_new"},
    {"act_fn": "tanh"}, {"act_fn": "sigmoid"}])
def test_variants_are_those_of_peft(options):
  peft = pytest.importorskip("peft")
  against.check("peanut", peft.PeanutConfig(
      r=3, target_modules=["q_proj"], **options), 12, 8)


def test_a_function_that_is_none_is_named():
  config = adapters_lib.AdapterConfig(
      method="peanut", options={"act_fn": "relu6"})
  with pytest.raises(errors.UsageError, match=r'act_fn="relu6".*relu'):
    registry.checked(config)
