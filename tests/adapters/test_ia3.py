"""(IA)^3 by hand, and PEFT's ways to say what is a feed-forward module."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax.adapters import ia3
from lora_jax.adapters import registry
from tests import tiny
from tests.adapters import with_peft

W = np.float32([[1, 2], [3, 4]])
BIAS = np.float32([10, 20])
X = np.float32([[1, 1]])
ON, OFF = np.int32(1), np.int32(0)


def test_outputs_are_scaled_with_their_bias():
  adapter = ia3.OutputScale(l=np.float32([2, -1]), rank=ON)
  # x W = (4, 6); (4, 6) + (10, 20) = (14, 26), times (2, -1).
  found = adapter.apply(X, W) + adapter.shift(BIAS)
  np.testing.assert_array_equal(found, [[28, -26]])
  np.testing.assert_array_equal(adapter.merge(W), [[2, -2], [6, -4]])
  assert adapter.shift(None) is None


def test_inputs_are_scaled_and_no_bias():
  adapter = ia3.InputScale(l=np.float32([2, -1]), rank=ON)
  # (2, -1) W = (2 - 3, 4 - 4).
  np.testing.assert_array_equal(adapter.apply(X, W), [[-1, 0]])
  np.testing.assert_array_equal(adapter.shift(BIAS), BIAS)
  np.testing.assert_array_equal(adapter.merge(W), [[2, 4], [-3, -4]])


@pytest.mark.parametrize("kind", [ia3.OutputScale, ia3.InputScale])
def test_a_layer_that_is_not_adapted_is_the_base(kind):
  adapter = kind(l=np.float32([2, -1]), rank=OFF)
  np.testing.assert_array_equal(adapter.apply(X, W), [[4, 6]])
  np.testing.assert_array_equal(adapter.shift(BIAS), BIAS)
  np.testing.assert_array_equal(adapter.merge(W), W)


@pytest.mark.parametrize("modules, expected", [
    (["down_proj"], ("down_proj",)),
    (["mlp.up_proj", "o_proj"], ("o_proj", "up_proj")),
    ([f"model.layers.{n}.mlp.down_proj" for n in range(3)], ("down_proj",)),
    (r".*\.mlp\.(up|down)_proj", ("up_proj", "down_proj")),
    (r"model\.layers\.1[0-9]\.mlp\.gate_proj", ("gate_proj",)),
    ("down_proj", ()),  # An expression is for the whole path.
    ([], ()), (None, ())])
def test_feedforward_modules_are_ends_of_paths_or_an_expression(
    modules, expected):
  found = ia3._block({"feedforward_modules": modules})
  assert found == {"options": {"feedforward": expected}}


def test_a_target_that_is_none_is_named():
  config = adapters_lib.AdapterConfig(
      method="ia3", options={"feedforward": "downproj"})
  with pytest.raises(
      errors.UsageError, match=r'feedforward="downproj".*down_proj'):
    registry.checked(config)


def made_by_peft(folder, modules):
  """A folder with random values of PEFT's, and its logits."""
  peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
  torch.manual_seed(0)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    model = peft.get_peft_model(with_peft.torch_model(), peft.IA3Config(
        target_modules=["k_proj", "up_proj", "down_proj"],
        feedforward_modules=modules)).eval()
  with torch.no_grad():
    for value in model.parameters():
      if value.requires_grad:
        value += 0.1 * torch.randn_like(value)
  model.save_pretrained(folder)
  return tiny.torch_logits(model, with_peft.TOKENS)


def test_an_adapter_of_peft_with_an_expression(tmp_path):
  expected = made_by_peft(tmp_path, r".*\.mlp\.(up|down)_proj")
  loaded = with_peft.read(tmp_path)
  assert loaded.config.options.feedforward == ("up_proj", "down_proj")
  assert tiny.distance(with_peft.logits(None), expected) > 1e-3
  assert tiny.distance(with_peft.logits(loaded.adapters), expected) <= 2e-5


def test_a_target_that_is_feedforward_in_some_layers_is_refused(tmp_path):
  made_by_peft(tmp_path, r"model\.layers\.0\.mlp\.down_proj")
  with pytest.raises(errors.UserError, match=r"down_proj.ia3_l has shape"):
    with_peft.read(tmp_path)
