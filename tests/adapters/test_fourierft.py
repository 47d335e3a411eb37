"""FourierFT: the inverse transform, and the waves that it parts into."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax.adapters import fourierft
from lora_jax.adapters import places
from tests import tiny
from tests.adapters import with_peft


def of(rows, columns, spectrum, scale=1.0):
  return fourierft.FourierFT(
      spectrum=np.float32(spectrum), scale=np.float32(scale),
      rank=np.int32(1)).bound(places.shared(
          {"": (np.array(rows), np.array(columns))}))


def test_one_coefficient_by_hand():
  # Delta W[q, p] = 8 / (2 4) 3 cos(2 pi (1 p / 4 + 1 q / 2)), i = 2, o = 4.
  wave = np.float32([[3, 0, -3, 0], [-3, 0, 3, 0]])
  adapter = of([1], [1], [3], scale=8)
  w = np.ones((2, 4), np.float32)
  np.testing.assert_allclose(adapter.merge(w), 1 + wave, atol=1e-6)
  x = np.float32([[5, 1]])
  np.testing.assert_allclose(adapter.apply(x, w), x @ (1 + wave), atol=1e-5)


@pytest.mark.parametrize("n", [1, 7, 12, 36])
def test_waves_are_a_fourier_transform(n):
  x = np.random.default_rng(0).standard_normal((3, n)).astype(np.float32)
  cosines, sines = fourierft.waves(x)
  expected = np.fft.fft(x)
  np.testing.assert_allclose(cosines, expected.real, atol=1e-5)
  np.testing.assert_allclose(sines, -expected.imag, atol=1e-5)


def test_waves_over_tokens_compute_what_the_inverse_transform_does():
  rng = np.random.default_rng(0)
  i, o, n = 24, 35, 50
  where = rng.permutation(i * o)[:n]
  spectrum = rng.standard_normal(n)
  adapter = of(where // i, where % i, spectrum, scale=30)
  x = rng.standard_normal((2, 5, i)).astype(np.float32)
  w = rng.standard_normal((i, o)).astype(np.float32)
  dense = np.zeros((o, i))
  dense[where // i, where % i] = spectrum
  delta = 30 * np.fft.ifft2(dense).real.T
  assert tiny.distance(adapter.apply(x, w), x @ (w + delta)) < 1e-6
  assert tiny.distance(adapter.merge(w), w + delta) < 1e-6


def test_places_are_those_peft_draws():
  torch = pytest.importorskip("torch")
  peft = pytest.importorskip("peft")
  config = peft.FourierFTConfig(
      n_frequency=20, random_loc_seed=5, target_modules=["0"])
  model = peft.get_peft_model(
      torch.nn.Sequential(torch.nn.Linear(6, 8)), config)
  indices = model.base_model.model[0].indices["default"].numpy()
  found = places.draw({"a": (6, 8), "b": (6, 8)}, 20, 5)
  np.testing.assert_array_equal(found["a"], indices)
  np.testing.assert_array_equal(found["b"], indices)


def test_it_may_start_at_zero():
  config = adapters_lib.AdapterConfig(
      method="fourierft", targets=("q_proj",),
      options={"n_frequency": 10, "init_weights": True})
  tree = with_peft.build(config, move=0.0)
  np.testing.assert_array_equal(tree.layers["q_proj"].spectrum, 0)
  trainable, _ = adapters_lib.split(tree)
  assert len(jax.tree.leaves(trainable)) == 1


def test_more_coefficients_than_entries_are_refused():
  with pytest.raises(errors.UsageError, match="from 1 to 48"):
    places.draw({"a": (6, 8)}, 49, 5)
