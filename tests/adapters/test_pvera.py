"""PVeRA: its mean, and what it draws in training."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import adapters as adapters_lib
from lora_jax import api
from lora_jax.adapters import pvera
from lora_jax.adapters import vera
from tests import tiny
from tests.adapters import with_peft

T = 4000
ADAPTER = pvera.PVeRA(
    lambda_b=np.float32([1, 10, 0]), lambda_d=np.float32([2, -1, 1, 2]),
    rate=np.float32(0), rank=np.int32(1), rows=2).bound(pvera.Projections(
        a=np.log(np.float32([[1, 2, 4, 1], [3, 4, 1, 3], [9, 9, 9, 9]])),
        b=np.float32([[1, 0, 5, 9], [0, 1, 5, 9]])))
X, W = np.float32([[1, 1]]), np.float32([[1, 0, 0], [0, 1, 0]])
# x A = log(3, 8, 4, 3), times lambda_d: mean (2 log 3, -log 8), and
# variances e^(log 4) = 4 and e^(2 log 3) = 9.
MEAN = np.float32([[1 + 2 * np.log(3), 1 - 10 * np.log(8), 0]])


def noise(key, t):
  return adapters_lib.Noise(
      jax.random.key(key), jnp.zeros((1, t), jnp.int32), jnp.arange(t)[None])


def test_without_noise_it_is_the_mean():
  np.testing.assert_allclose(ADAPTER.apply(X, W), MEAN, rtol=1e-6)
  np.testing.assert_allclose(X @ ADAPTER.merge(W), MEAN, rtol=1e-6)
  np.testing.assert_allclose(
      X @ (W + np.matmul(*ADAPTER.factors())), MEAN, rtol=1e-6)


def test_in_training_every_token_draws_its_own():
  x = np.tile(X, (1, T, 1))
  drawn = np.asarray(ADAPTER.apply(x, W, noise(0, T)))[0]
  # Standard deviations 2 and 3, times lambda_b; within 4 standard errors.
  deviation = np.array([2, 30, 0])
  assert (np.abs(drawn.mean(0) - MEAN[0]) <= 4 * deviation / T**0.5).all()
  assert (np.abs(drawn.std(0) - deviation)
          <= 4 * deviation / (2 * T)**0.5).all()
  assert abs(np.corrcoef(drawn[:, :2].T)[0, 1]) < 4 / T**0.5
  again = ADAPTER.apply(x, W, noise(0, T))[0]
  other = ADAPTER.apply(x, W, noise(1, T))[0]
  np.testing.assert_array_equal(again, drawn)
  assert tiny.distance(other, drawn) > 0.1


def test_a_run_draws_without_dropout():
  model = api.Model(
      config=with_peft.CONFIG, base=with_peft.base(), tokenizer=None,
      fingerprint="", source="")
  for method, draws in (("pvera", True), ("vera", False)):
    adapted = model.adapt(method=method, rank=4, targets=("q_proj",))
    assert adapted.settings(layout="single", steps=1).noise is draws


def test_a_folder_without_projections(tmp_path):
  config = adapters_lib.AdapterConfig(
      method="pvera", rank=4, targets=("q_proj", "down_proj"),
      options=vera.Options(projection_key=7, save_projection=False))
  _, tensors = with_peft.check(config, tmp_path)
  assert len(tensors) == 2 * 2 * with_peft.CONFIG.n_layers
