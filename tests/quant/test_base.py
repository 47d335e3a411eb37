"""Layout, tails, exact dequantisation of every format in jit and in scan."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import errors
from lora_jax import quant
from lora_jax.quant import dynamic
from tests.quant import reference

FORMATS = list(quant.FORMATS)


def weight(rows=576, out=48, seed=0, scale=0.05):
  rng = np.random.default_rng(seed)
  return np.float32(rng.standard_normal((rows, out)) * scale)


@pytest.mark.parametrize("size", [0, 7, -64, 64.0, "64"])
def test_a_bad_block_size_is_named(size):
  with pytest.raises(errors.UserError, match=r"quant\.block_size=.*even"):
    quant.QuantSpec(block_size=size)


@pytest.mark.parametrize("name", FORMATS)
def test_odd_rows(name):
  w = weight(63, 4)
  spec = quant.QuantSpec(name, 64, False)
  if name in reference.WHOLE_BYTES:
    assert quant.quantize(w, spec).shape == (63, 4)
  else:
    with pytest.raises(errors.UserError, match=f'in_features=63.*"{name}"'):
      quant.quantize(w, spec)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rows,size", [(576, 128), (64, 64), (48, 64)])
def test_codes_and_statistics_equal_numpys(name, rows, size):
  w = weight(rows)
  w[:40, 3] = 0.0
  w[:, 4] = 0.0
  w[:, 5] = 0.25
  got = quant.quantize(w, quant.QuantSpec(name, size, double=False))
  if name == "llm_int8":
    size = rows
  codes, scales, minimums = reference.encode(name, w, size)
  stored = np.asarray(got.codes)
  if name not in reference.WHOLE_BYTES:
    assert stored.shape == (rows // 2, 48) and stored.dtype == np.uint8
    stored = reference.nibbles(stored, size)
  np.testing.assert_array_equal(stored, codes)
  np.testing.assert_array_equal(got.scales, scales)
  assert got.scales.shape == (-(-rows // size), 48)
  if name == "int4_affine":
    np.testing.assert_array_equal(got.minimums, minimums)
  assert got.shape == (rows, 48)
  np.testing.assert_array_equal(got.dequantize()[:, 4], 0.0)


@pytest.mark.parametrize("name", sorted({*FORMATS} - {"llm_int8"}))
def test_a_tail_is_a_short_block_of_its_own(name):
  w = weight(576)
  whole = quant.quantize(w, quant.QuantSpec(name, 128, False)).dequantize()
  head = quant.quantize(w[:512], quant.QuantSpec(name, 128, False))
  tail = quant.quantize(w[512:], quant.QuantSpec(name, 64, False))
  np.testing.assert_array_equal(
      whole, np.concatenate([head.dequantize(), tail.dequantize()]))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_dequantised_bits_equal_numpys_in_jit_and_scan(name, nested, dtype):
  """Also where an addition follows, which XLA would contract to an FMA, and
  where bfloat16 goes back to float32, a rounding that XLA would drop."""
  w = np.stack([weight(320, 96, seed) for seed in (1, 2)])
  delta = weight(320, 96, 3)
  spec = quant.QuantSpec(name, 128, nested)
  stack = quant.quantize(w, spec)
  layers = [jax.tree.map(lambda x, i=i: x[i], stack) for i in range(2)]
  expected = np.stack([
      reference.dequantize(name, layer, dynamic.table())
      for layer in layers])
  expected = expected.astype(jnp.dtype(dtype)).astype(np.float32)

  def use(w):
    w = quant.dequantize(w, dtype).astype(jnp.float32)
    return w, w + delta

  @jax.jit
  def both(stack):
    one = use(jax.tree.map(lambda x: x[0], stack))
    return one, jax.lax.scan(lambda c, w: (c, use(w)), 0, stack)[1]

  (plain, added), (scanned, scanned_added) = both(stack)
  np.testing.assert_array_equal(plain, expected[0])
  np.testing.assert_array_equal(added, expected[0] + delta)
  np.testing.assert_array_equal(scanned, expected)
  np.testing.assert_array_equal(scanned_added, expected + delta)


def test_shapes_come_from_the_codes():
  stack = quant.quantize(np.stack([weight(64, 8)] * 3), quant.QuantSpec())
  assert stack.shape == (3, 64, 8) and stack.in_features == 64
  assert stack.out_features == 8 and stack.ndim == 3
  seen = []

  def step(carry, w):
    seen.append(w.shape)
    return carry, quant.dequantize(w)

  _, ys = jax.lax.scan(step, 0, stack)
  assert seen[0] == (64, 8)
  np.testing.assert_array_equal(ys, quant.dequantize(stack))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_visible(name, bad):
  w = weight(128, 4)
  w[3, 1] = bad
  spec = quant.QuantSpec(name, 64, double=False)
  got = np.isnan(quant.quantize(w, spec).dequantize())
  block = 128 if name == "llm_int8" else 64
  assert got[:block, 1].all() and got.sum() == block
