"""INT4 and INT8: values by hand, and the gain of the affine form."""

from __future__ import annotations

import numpy as np

from lora_jax import quant
from tests.quant import reference


def exact(name, size=4):
  return quant.QuantSpec(name, size, double=False)


def test_int4_by_hand():
  w = np.float32([[7.0], [-3.4], [0.6], [-7.0]])
  got = quant.quantize(w, exact("int4"))
  np.testing.assert_array_equal(
      reference.nibbles(got.codes, 4)[:, 0], [15, 5, 9, 1])
  np.testing.assert_allclose(
      got.dequantize()[:, 0], [7, -3, 1, -7], rtol=1e-6)


def test_int4_affine_by_hand():
  w = np.float32([[10.0], [17.5], [12.2], [25.0]])
  got = quant.quantize(w, exact("int4_affine"))
  np.testing.assert_array_equal(
      reference.nibbles(got.codes, 4)[:, 0], [0, 8, 2, 15])
  np.testing.assert_allclose(got.scales, [[1.0]], rtol=1e-6)
  np.testing.assert_allclose(got.minimums, [[10.0]])
  np.testing.assert_allclose(
      got.dequantize()[:, 0], [10, 18, 12, 25], rtol=1e-6)


def test_int8_by_hand():
  w = np.float32([[127.0], [-3.4], [0.6], [-50.0]])
  got = quant.quantize(w, exact("int8"))
  np.testing.assert_array_equal(got.codes[:, 0], [127, -3, 1, -50])
  assert got.codes.dtype == np.int8 and got.codes.shape == (4, 1)
  np.testing.assert_allclose(
      got.dequantize()[:, 0], [127, -3, 1, -50], rtol=1e-6)


def test_the_affine_form_follows_an_offset():
  rng = np.random.default_rng(0)
  w = np.float32(5 + 0.1 * rng.standard_normal((128, 32)))
  error = {
      name: np.abs(quant.quantize(w, quant.QuantSpec(name)).dequantize()
                   - w).max() for name in ("int4", "int4_affine")}
  assert error["int4_affine"] < 0.03 < 0.1 < error["int4"]


def test_affine_errors_stay_within_half_a_step():
  rng = np.random.default_rng(1)
  w = rng.standard_normal((256, 64), dtype=np.float32)
  got = quant.quantize(w, exact("int4_affine", 64))
  error = np.abs(np.asarray(got.dequantize()) - w).reshape(4, 64, 64)
  assert (error <= np.asarray(got.scales)[:, None] * 0.500001).all()
  # Uniform in a step but for the two ends: step^2 / 12, to a few percent.
  expected = np.mean(np.square(got.scales)) / 12 * 62 / 64
  np.testing.assert_allclose(np.mean(error**2), expected, rtol=0.03)
