"""NF4 and FP4: bit for bit bitsandbytes', and the published error of both."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import quant
from lora_jax.quant import fp4
from lora_jax.quant import int4
from lora_jax.quant import nf4
from tests.quant import reference

# N(0, 1) in blocks: mean squared and mean absolute error, exact quadrature.
GOLDEN = {
    ("nf4", 32): (0.00762341784460622, 0.06774769322756759),
    ("nf4", 64): (0.00846005290661305, 0.07279553195981535),
    ("nf4", 128): (0.009135622415694543, 0.07683545507992232),
    ("nf4", 256): (0.00972882974713936, 0.08032933125932575),
    ("fp4", 32): (0.013026219154512853, 0.08891959690533129),
    ("fp4", 64): (0.014870519525713468, 0.09654555317562334),
    ("fp4", 128): (0.0165327268377986, 0.1029477534840052),
    ("fp4", 256): (0.018121419356231665, 0.10868816887918434),
    ("int4", 32): (0.009409726187996396, 0.08122578151219163),
    ("int4", 64): (0.011577572839314931, 0.09128775700357913),
    ("int4", 128): (0.013751875667743848, 0.10020978258697502),
    ("int4", 256): (0.015932415549349408, 0.10830845569955107),
    ("int8", 32): (2.8577349739834608e-05, 0.004475855857140996),
    ("int8", 64): (3.516374591305071e-05, 0.005030606502279689),
    ("int8", 128): (4.1770507917047e-05, 0.005522576307078538),
    ("int8", 256): (4.839653727626998e-05, 0.005969163257345004),
}


@pytest.fixture(scope="module")
def normal():
  rng = np.random.default_rng(7)
  return rng.standard_normal((1024, 1024), dtype=np.float32)


def errors_of(normal, name, size):
  spec = quant.QuantSpec(name, size, double=False)
  return np.asarray(quant.quantize(normal, spec).dequantize()) - normal


def within(values, size, expected):
  """Mean of `[i, o]` values within 4.5 standard errors of `expected`.

  The blocks are independent, so their means give the sampling error.
  """
  means = values.reshape(-1, size, values.shape[-1]).mean(1, np.float64)
  error = means.std() / np.sqrt(means.size)
  assert error < 0.004 * expected  # The test means something.
  assert abs(means.mean() - expected) < 4.5 * error


@pytest.mark.parametrize("name,size", GOLDEN)
def test_golden_errors(normal, name, size):
  error = errors_of(normal, name, size)
  squared, absolute = GOLDEN[name, size]
  within(error**2, size, squared)
  within(np.abs(error), size, absolute)


@pytest.mark.parametrize("name,frobenius,snr", [
    ("nf4", 0.0919785, 20.7263), ("fp4", 0.1219447, 18.2767),
    ("int4", 0.1075991, 19.3638)])
def test_golden_frobenius_and_snr(normal, name, frobenius, snr):
  error = errors_of(normal, name, 64)
  ratio = np.linalg.norm(error) / np.linalg.norm(normal)
  # 0.1% of sampling error in the squared error (see above) and in the norm.
  np.testing.assert_allclose(ratio, frobenius, rtol=2e-3)
  np.testing.assert_allclose(-20 * np.log10(ratio), snr, atol=0.0175)


@pytest.mark.parametrize("name,absolute,relative", [
    ("nf4", 0.072798, 0.203339), ("fp4", 0.096543, 0.260125)])
def test_golden_relative_errors(normal, name, absolute, relative):
  error = np.abs(errors_of(normal, name, 64))
  # Four of bitsandbytes' standard deviations, 0.000074 and 0.000340.
  assert abs(error.mean() - absolute) < 4 * 0.000074
  ratio = error / (np.abs(normal) + 1e-8)
  assert abs(ratio.mean() - relative) < 4 * 0.000340


def test_golden_absmax(normal):
  scales = quant.quantize(normal, quant.QuantSpec(double=False)).scales
  within(np.asarray(scales), 1, 2.5961108)


def test_tables():
  np.testing.assert_array_equal(nf4.NF4.table(), reference.NF4)
  np.testing.assert_array_equal(fp4.FP4.table(), reference.FP4)
  np.testing.assert_array_equal(int4.Int4.table(), np.arange(-8, 8))


def test_the_nf4_table_is_made_of_quantiles():
  """QLoRA, appendix E, with the rounded 929/960 that bitsandbytes names.

  The table was computed in float32: one unit in the last place of 1.
  """
  norm = pytest.importorskip("scipy.stats").norm
  end = 0.9677083
  positive = norm.ppf(np.linspace(end, 0.5, 9)[:-1]) / norm.ppf(end)
  negative = -norm.ppf(np.linspace(end, 0.5, 8)[:-1]) / norm.ppf(end)
  table = np.sort(np.concatenate([positive, negative, [0.0]]))
  np.testing.assert_allclose(nf4.NF4.table(), table, rtol=0, atol=2**-23)


def bnb_quantize(w, name, size=64):
  torch = pytest.importorskip("torch")
  functional = pytest.importorskip("bitsandbytes.functional")
  dtype = getattr(torch, str(w.dtype))
  tensor = torch.tensor(np.asarray(w, np.float32)).to(dtype)
  packed, state = functional.quantize_4bit(
      tensor.T.contiguous(), blocksize=size, quant_type=name)
  flat = packed.numpy().reshape(-1)
  codes = np.stack([flat >> 4, flat & 15], 1).reshape(w.shape[::-1]).T
  absmax = state.absmax.numpy().reshape(w.shape[1], -1).T
  return codes, absmax, functional.dequantize_4bit(packed, state).float().T


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("size", [64, 128])
def test_bits_equal_bitsandbytes(normal, name, size, dtype):
  w = normal[:, :256].copy()
  w[:, 5] = 0.0
  w[:64, 6] = 0.0
  w[:, 7] = 0.125
  w = jnp.asarray(w, dtype)
  codes, absmax, values = bnb_quantize(w, name, size)
  got = quant.quantize(w, quant.QuantSpec(name, size, double=False))
  np.testing.assert_array_equal(
      reference.nibbles(got.codes, size), codes)
  np.testing.assert_array_equal(got.scales, absmax)
  # Values of bitsandbytes' own dequantisation; -0 equals 0 in numpy.
  np.testing.assert_array_equal(
      np.asarray(got.dequantize(dtype), np.float32), values.numpy())
  zero = {"nf4": 0x77, "fp4": 0x00}[name]
  assert (np.asarray(got.codes)[:, 5] == zero).all()


def reciprocal_matters():
  """Pairs (x, absmax) whose code differs for x / absmax, one a column."""
  rng = np.random.default_rng(0)
  middles = (reference.NF4[1:] + reference.NF4[:-1]) / np.float32(2)
  peak = rng.uniform(0.5, 2, 4000).astype(np.float32)
  x = (rng.choice(middles, 4000) * peak).astype(np.float32)
  product = x * (np.float32(1) / peak)
  differ = (np.searchsorted(middles, product)
            != np.searchsorted(middles, x / peak))
  return x[differ], peak[differ]


def test_the_code_is_that_of_the_product_with_the_reciprocal():
  x, peak = reciprocal_matters()
  assert x.size > 50
  w = np.zeros((64, x.size), np.float32)
  w[0], w[1] = peak, x
  got = quant.quantize(w, quant.QuantSpec(double=False))
  codes, _, _ = reference.encode("nf4", w, 64)
  np.testing.assert_array_equal(reference.nibbles(got.codes, 64), codes)
  np.testing.assert_array_equal(
      reference.nibbles(got.codes, 64), bnb_quantize(w, "nf4")[0])


def test_quantising_twice_changes_nothing(normal):
  """The grid is a fixed point; int4's too, through its rounded scale."""
  for name in ("nf4", "fp4", "int4"):
    spec = quant.QuantSpec(name, 64, double=False)
    once = quant.quantize(normal[:, :64], spec).dequantize()
    twice = quant.quantize(once, spec).dequantize()
    np.testing.assert_allclose(twice, once, rtol=3e-7)


def test_int4_is_odd(normal):
  """w and -w share a grid; NF4, which is not symmetric, fails this."""
  both = {}
  for name in ("int4", "nf4"):
    spec = quant.QuantSpec(name, 64, double=False)
    plus, minus = (jax.device_get(quant.quantize(s * normal[:, :64], spec)
                                  .dequantize()) for s in (1, -1))
    both[name] = np.abs(plus + minus).max()
  assert both["int4"] == 0 and both["nf4"] > 0.1
