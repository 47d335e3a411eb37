"""VeRA: its equation, and projections that only a seed tells."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax.adapters import method as method_lib
from lora_jax.adapters import partition
from lora_jax.adapters import vera
from tests.adapters import with_peft

CONFIG = adapters_lib.AdapterConfig(
    method="vera", rank=4, targets=("q_proj", "down_proj"),
    options=vera.Options(projection_key=7, save_projection=False))


def test_the_equation_by_hand():
  adapter = vera.VeRA(
      lambda_b=np.float32([1, 10, 0]), lambda_d=np.float32([2, -1]),
      rate=0.0, rank=np.int32(1), rows=2).bound(vera.Projections(
          a=np.float32([[1, 2], [3, 4], [9, 9]]),
          b=np.float32([[1, 0, 5, 9], [0, 1, 5, 9]])))
  x, w = np.float32([[1, 1]]), np.float32([[1, 0, 0], [0, 1, 0]])
  # x A = (4, 6), times lambda_d (8, -6), B's first columns, times lambda_b.
  np.testing.assert_array_equal(adapter.apply(x, w), [[1 + 8, 1 - 60, 0]])
  np.testing.assert_array_equal(
      adapter.merge(w), [[1 + 2, 0 - 20, 0], [0 + 6, 1 - 40, 0]])


def test_projections_are_those_peft_draws():
  torch = pytest.importorskip("torch")
  model = pytest.importorskip("peft.tuners.vera.model")
  options = vera.Options(projection_key=7)
  shared = vera.share(None, method_lib.Modules(
      {"q": (6, 10), "down": (9, 4)}, 5, options))
  generator = torch.Generator().manual_seed(7)
  a = model._kaiming_init((5, 9), generator=generator)
  b = model._kaiming_init((10, 5), generator=generator)
  np.testing.assert_allclose(shared.a.T, a, rtol=0, atol=1e-7)
  np.testing.assert_allclose(shared.b.T, b, rtol=0, atol=1e-7)


def test_a_folder_without_projections_is_read_and_written(tmp_path):
  loaded, tensors = with_peft.check(CONFIG, tmp_path)
  assert len(tensors) == 2 * 2 * with_peft.CONFIG.n_layers
  assert not loaded.config.options.save_projection


def test_projections_are_neither_trained_nor_counted():
  tree = with_peft.build(CONFIG)
  trainable, _ = adapters_lib.split(tree)
  assert not jax.tree.leaves(trainable.shared)
  assert partition.trainable_size(tree) == 3 * (32 + 4 + 32 + 4)


def test_a_folder_that_lacks_them_is_refused(tmp_path):
  config = dataclasses.replace(CONFIG, options=vera.Options())
  tree = with_peft.build(config)
  with_peft.write(tmp_path / "a", config, dataclasses.replace(
      tree, shared=tree.shared.replace(saved=False)))
  with pytest.raises(errors.UserError, match="vera_A is missing"):
    with_peft.read(tmp_path / "a")
