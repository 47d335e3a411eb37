"""WaveFT: its wavelets, and PEFT's weight of its coefficients."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax.adapters import base
from lora_jax.adapters import method as method_lib
from lora_jax.adapters import places
from lora_jax.adapters import registry
from lora_jax.adapters import waveft
from lora_jax.adapters import wavelets
from tests import tiny


def test_one_coefficient_by_hand():
  # Haar's, i = 2, o = 4: the detail over the input and the coarse of the
  # output's last two, in PEFT's lower left quarter: row 2 + 1, column 0.
  rows, columns = waveft._waves(np.array([3]), np.array([0]), (2, 4), "db1")
  assert (rows.tolist(), columns.tolist()) == ([1], [1])
  adapter = waveft.WaveFT(
      spectrum=np.float32([3]), scale=np.float32(2), rank=np.int32(1)
  ).bound(places.shared({"": (rows, columns)}))
  w = np.zeros((2, 4), np.float32)
  delta = np.float32([[0, 0, 3, 3], [0, 0, -3, -3]])
  np.testing.assert_allclose(adapter.merge(w), delta, atol=1e-6)
  x = np.float32([[5, 1]])
  np.testing.assert_allclose(adapter.apply(x, w), x @ delta, atol=1e-5)


@pytest.mark.parametrize("name", wavelets.NAMES)
def test_filters_are_orthogonal_and_those_of_peft(name):
  h = wavelets.low_pass(name)
  shifted = [h[:len(h) - 2 * k] @ h[2 * k:] for k in range(len(h) // 2)]
  np.testing.assert_allclose(shifted, np.eye(1, len(h) // 2)[0], atol=1e-10)
  peft = pytest.importorskip("peft.tuners.waveft.wavelet")
  np.testing.assert_allclose(h, peft.Wavelet(name).rec_lo, atol=1e-10)


def test_analysis_is_the_transpose_of_synthesis():
  m = wavelets.coefficients("db2", 7)
  synthesis = np.stack([
      wavelets.synthesis("db2", row, 7) for row in np.eye(m, dtype="float32")])
  analysis = wavelets.analysis("db2", np.eye(7, dtype="float32"))
  np.testing.assert_allclose(analysis, synthesis.T, atol=1e-7)


@pytest.mark.parametrize("options", [
    {}, {"wavelet_family": "sym3"}, {"wavelet_family": "coif1"},
    {"use_idwt": False}], ids=str)
def test_the_weight_is_pefts(options):
  """Of odd sizes, too, where there is one coefficient more."""
  torch = pytest.importorskip("torch")
  peft = pytest.importorskip("peft")
  i, o, count = 11, 14, 40
  config = peft.WaveFTConfig(
      n_frequency=count, target_modules=["0"], init_weights=False, **options)
  model = peft.get_peft_model(
      torch.nn.Sequential(torch.nn.Linear(i, o)), config)
  module = model.base_model.model[0]
  with torch.no_grad():
    module.waveft_spectrum["default"] *= 100
    expected = module.get_delta_weight("default").numpy().T
  checked = registry.checked(adapters_lib.AdapterConfig(
      method="waveft", options={"n_frequency": count} | options))
  slot = base.Slot(
      rank=np.int32(1), scale=np.float32(25), rate=0.0, target="a",
      options=checked.options)
  adapter = waveft.WaveFT.from_peft(
      {"waveft_spectrum": module.waveft_spectrum["default"].detach().numpy()},
      slot).bound(waveft.share(
          None, method_lib.Modules({"a": (i, o)}, 1, checked.options)))
  w = np.zeros((i, o), np.float32)
  assert tiny.distance(adapter.merge(w), expected) < 1e-6
  x = np.random.default_rng(0).standard_normal((3, i)).astype(np.float32)
  found = jax.jit(lambda x: adapter.apply(x, w))(x)
  assert tiny.distance(found, x @ expected) < 1e-6


def test_pefts_coif4_and_coif5_are_no_wavelets_and_refused():
  # sum h = 1 (times sqrt 2) is what makes a low-pass filter of a wavelet.
  peft = pytest.importorskip("peft.tuners.waveft.wavelet")
  sums = [sum(peft._WAVELET_COEFFS[f"coif{n}"]) for n in (3, 4, 5)]
  np.testing.assert_allclose(sums, [1, 1.0242437, 1.0056981], atol=1e-6)
  with pytest.raises(errors.UsageError, match="coif4"):
    registry.checked(adapters_lib.AdapterConfig(
        method="waveft", options={"wavelet_family": "coif4"}))
