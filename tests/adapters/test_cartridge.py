"""Cartridges: what is trained of them, and a text's cache as the start."""

from __future__ import annotations

import warnings

import jax
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax.adapters import cartridge
from lora_jax.adapters import prefix
from lora_jax.adapters import registry
from tests import tiny
from tests.adapters import contract
from tests.adapters import with_peft

N = 4


def config(**options):
  return registry.checked(adapters_lib.AdapterConfig(
      method="cartridge", options={"tokens": N} | options))


def plain(tree):
  """The same keys and values, as prefix tuning has them."""
  one = tree.layers["self_attn"]
  return adapters_lib.Adapters(layers={"self_attn": prefix.Prefix(
      keys=np.concatenate([one.sink_keys, one.keys], 1),
      values=np.concatenate([one.sink_values, one.values], 1),
      rank=one.rank)})


@pytest.mark.parametrize("frozen", [0, 1, 3])
def test_it_is_a_prefix_of_which_the_first_tokens_stay(frozen):
  tree = with_peft.build(config(frozen=frozen))
  np.testing.assert_allclose(
      with_peft.logits(tree), with_peft.logits(plain(tree)), atol=1e-6)
  base, data = contract.quantised("none"), contract.stacked(contract.batch())
  key = jax.random.key(0)

  def gradient(tree):
    return contract.gradient(
        *adapters_lib.split(tree), base, data, key)[1].layers["self_attn"]

  ours, whole = gradient(tree), gradient(plain(tree))
  assert ours.sink_keys is None and ours.sink_values is None
  for name in ("keys", "values"):
    expected = getattr(whole, name)[:, frozen:]
    assert np.abs(expected).max() > 0
    np.testing.assert_allclose(getattr(ours, name), expected, atol=1e-7)
  # 3 layers, 2 heads of 8.
  assert adapters_lib.trainable_size(tree) == 3 * 2 * (N - frozen) * 2 * 8


@pytest.mark.parametrize("frozen", [0, 2])
def test_it_is_peft_s(frozen, tmp_path):
  loaded, tensors = with_peft.check(config(frozen=frozen), tmp_path)
  one = loaded.adapters.layers["self_attn"]
  assert loaded.config.options == cartridge.Options(N, frozen)
  assert one.sink_keys.shape == (3, frozen, 2, 8)
  # PEFT's rows are tokens, and the first of them are those that stay.
  rows = tensors["prompt_embeddings"].reshape(N, 3, 2, 2, 8)
  np.testing.assert_array_equal(
      np.moveaxis(one.sink_values, 0, 1), rows[:frozen, :, 1])
  np.testing.assert_array_equal(
      np.moveaxis(one.keys, 0, 1), rows[frozen:, :, 0])


def test_a_text_s_cache_stands_for_the_text(tmp_path):
  """PEFT starts one at a text; what it saves is the text in the context."""
  peft = pytest.importorskip("peft")
  torch = pytest.importorskip("torch")
  from peft.tuners.cartridge import utils

  text = np.random.default_rng(1).integers(0, 31, (2, N)).astype(np.int32)
  text[1] = text[0]
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    model = peft.get_peft_model(with_peft.torch_model(), peft.CartridgeConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=N))
    with torch.no_grad(), model.disable_adapter():
      run = model(torch.from_numpy(text[:1].astype(np.int64)), use_cache=True)
    utils.initialize_kv_prefix_from_past_key_values(
        model, past_key_values=run.past_key_values)
    model.save_pretrained(str(tmp_path / "a"))
  tree = with_peft.read(tmp_path / "a").adapters
  ahead = np.concatenate([text, with_peft.TOKENS], 1)
  positions = np.tile(np.arange(ahead.shape[1], dtype=np.int32), (2, 1))
  expected = tiny.logits(
      with_peft.CONFIG, with_peft.base(), ahead, positions,
      np.ones_like(positions))[:, N:]
  assert tiny.distance(with_peft.logits(tree), expected) <= 2e-5
  assert tiny.distance(with_peft.logits(None), expected) > 1e-2


@pytest.mark.parametrize("options, text", [
    ({"tokens": 0}, "adapter.options.tokens=0"),
    ({"frozen": -1}, "adapter.options.frozen=-1"),
    ({"frozen": N}, "use an integer from 0 to 3")])
def test_what_cannot_be_is_refused(options, text):
  with pytest.raises(errors.UsageError, match=text):
    config(**options)
