"""GLoRA by hand, and PEFT's variants of it."""

from __future__ import annotations

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.adapters import glora
from tests import tiny
from tests.adapters import against

W = np.float32([[1, 2], [3, 4]])
BIAS = np.float32([10, 20])
X = np.float32([[1, 10]])


def test_by_hand():
  adapter = glora.GLoRA(
      rank=np.int32(1), shape=(2, 2),
      a_d=np.float32([[1], [0]]), a_u=np.float32([[2, 3]]),
      b_d=np.float32([[0], [1]]), b_u=np.float32([[5, 7]]),
      d=np.float32([1]), e=np.float32([0.5]))
  # A = [[2, 0], [3, 0]], B = [[0, 5], [0, 7]].
  np.testing.assert_array_equal(adapter.merge(W), [[3, 7], [12, 11]])
  np.testing.assert_array_equal(adapter.apply(X, W), [[123, 117]])
  np.testing.assert_array_equal(adapter.shift(BIAS), [20.5, 40.5])
  assert adapter.shift(None) is None


def test_values_of_outputs_by_hand():
  adapter = glora.GLoRA(
      rank=np.int32(1), shape=(2, 2), a=np.float32([[1], [-1]]),
      b=np.float32([[0], [2]]), d=np.float32([1, 0]), e=np.float32([0, 3]))
  np.testing.assert_array_equal(adapter.merge(W), [[2, 2], [6, 2]])
  np.testing.assert_array_equal(adapter.apply(X, W), [[62, 22]])
  np.testing.assert_array_equal(adapter.shift(BIAS), [20, 23])


@pytest.mark.parametrize("weight", ["lora", "vector", "constant", "none"])
@pytest.mark.parametrize("bias", ["vector", "constant", "none"])
def test_variants_are_those_of_peft(weight, bias):
  peft = pytest.importorskip("peft")
  if weight == bias == "none":
    return  # Nothing is trained.
  against.check("glora", peft.GloraConfig(
      r=2, config_A_B=weight, config_C="none", config_D_E=bias,
      target_modules=["q_proj"]), 12, 8)


def test_a_projection_without_a_bias_is_that_of_peft():
  """Whose C, D and E are zeros then, whatever its config says, and saved."""
  peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
  torch.manual_seed(0)
  linear = torch.nn.Linear(12, 8, bias=False)
  w = linear.weight.detach().numpy().T.copy()
  config = peft.GloraConfig(r=2, target_modules=["q_proj"])
  assert config.config_C == "lora"
  model = peft.get_peft_model(torch.nn.Sequential(
      collections.OrderedDict(q_proj=linear)), config)
  with torch.no_grad():
    for value in model.parameters():
      if value.requires_grad:
        value += 0.3 * torch.randn_like(value)
  tensors = {name.split("q_proj.")[1]: value.numpy() for name, value in
             peft.get_peft_model_state_dict(model).items()}
  slot = dataclasses.replace(
      against.slot("glora", config, 12, 8),
      geometry=dataclasses.replace(against.GEOMETRY, biased=()))
  fresh = glora.init(jax.random.key(0), jnp.asarray(w), slot)
  assert {k: v.shape for k, v in fresh.to_peft().items()} == {
      k: v.shape for k, v in tensors.items()}
  adapter = glora.GLoRA.from_peft(tensors, slot)
  x = torch.randn(3, 12)
  assert tiny.distance(
      adapter.apply(x.numpy(), w), model(x).detach().numpy()) < 2e-6
