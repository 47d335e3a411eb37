"""VB-LoRA: mixtures by hand, and folders with k numbers of each."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax.adapters import partition
from lora_jax.adapters import registry
from lora_jax.adapters import vblora
from tests import tiny
from tests.adapters import with_peft

OPTIONS = {"num_vectors": 10, "vector_length": 8, "topk": 3,
           "init_vector_bank_bound": 0.5}
CONFIG = adapters_lib.AdapterConfig(
    method="vblora", rank=4, targets=("q_proj", "down_proj"), options=OPTIONS)


def test_the_mixtures_by_hand():
  bank = np.float32([[1, 0], [0, 2], [9, 9]])
  log3 = np.log(3.0)
  adapter = vblora.VBLoRA(
      # i = 4, o = 2, r = 1: pieces (0.75, 0.5), (0, 2) / 2 + (9, 9) / 2.
      logits_a=np.float32([[[log3, 0, -9], [-5, 1, 1]]]),
      # And 0.25 (1, 0) + 0.75 (0, 2).
      logits_b=np.float32([[[7, 7 + log3, -9]]]),
      rate=0.0, rank=np.int32(1)).bound(vblora.Bank(vectors=bank))
  a, b = adapter.factors()
  np.testing.assert_allclose(
      a, [[0.75], [0.5], [4.5], [5.5]], rtol=1e-6)
  np.testing.assert_allclose(b, [[0.25, 1.5]], rtol=1e-6)
  w = np.ones((4, 2), np.float32)
  x = np.float32([[2, 0, 0, 1]])
  np.testing.assert_allclose(
      adapter.apply(x, w), [[3 + 7 * 0.25, 3 + 7 * 1.5]], rtol=1e-6)


def test_all_layers_train_the_bank_and_only_chosen_logits():
  tree = with_peft.build(CONFIG)
  trainable, frozen = adapters_lib.split(tree)
  assert partition.trainable_size(tree) == 10 * 8 + 3 * 4 * 10 * (
      (32 + 32) // 8 + (48 + 32) // 8)
  one = partition.module(tree, "q_proj", 0)
  x = np.ones((2, 32), np.float32)

  def loss(part, layer):
    whole = adapters_lib.join(part, frozen)
    return (partition.module(whole, "q_proj", layer).down_up(x) ** 2).sum()

  grads = [jax.grad(loss)(trainable, layer) for layer in (0, 1)]
  first, second = (np.asarray(g.shared.vectors) for g in grads)
  assert np.abs(first).max() > 0 and np.abs(first - second).max() > 0
  moved = np.asarray(grads[0].layers["q_proj"].logits_a[0]) != 0
  chosen = np.argsort(-np.asarray(one.logits_a), -1)[..., :3]
  np.testing.assert_array_equal(
      np.sort(chosen, -1), np.argwhere(moved)[:, 2].reshape(chosen.shape))


@pytest.mark.parametrize("count", [10, 300])
def test_a_folder_with_few_numbers(count, tmp_path):
  """PEFT reads ours, and we read ours back; indices in 8 and in 16 bits."""
  peft = pytest.importorskip("peft")
  config = registry.checked(dataclasses.replace(CONFIG, options=OPTIONS | {
      "save_only_topk_weights": True, "num_vectors": count}))
  tree = with_peft.build(config)
  with_peft.write(tmp_path / "a", config, tree)
  tensors = with_peft.tensors(tmp_path / "a")
  name = "base_model.model.model.layers.0.self_attn.q_proj.vblora_logits_A"
  assert tensors[f"{name}_topk_indices"].dtype == (
      np.uint8 if count == 10 else np.int16)
  assert tensors[f"{name}_topk_weights"].shape == (4, 4, 2)
  assert len(tensors) == 1 + 3 * 2 * 4
  here = with_peft.logits(tree)
  loaded = with_peft.read(tmp_path / "a")
  assert tiny.distance(with_peft.logits(loaded.adapters), here) < 2e-5
  model = peft.PeftModel.from_pretrained(
      with_peft.torch_model(), str(tmp_path / "a")).eval()
  assert tiny.distance(
      here, tiny.torch_logits(model, with_peft.TOKENS)) < 2e-5


@pytest.mark.parametrize("options, message", [
    ({"topk": 11, "num_vectors": 10}, "topk=11"),
    ({"vector_length": 5}, "vector_length=5 does not divide q_proj's 32 x 32"),
])
def test_what_cannot_be(options, message):
  with pytest.raises(errors.UsageError, match=message):
    with_peft.build(dataclasses.replace(CONFIG, options=OPTIONS | options))
