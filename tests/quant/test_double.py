"""The nested statistics."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from lora_jax.quant import double
from lora_jax.quant import dynamic

nest = jax.jit(double.nest)


def statistics(q=9, out=96, seed=0):
  rng = np.random.default_rng(seed)
  return np.float32(2.6 + 0.4 * rng.standard_normal((q, out)))


def test_order_blocks_and_offset():
  x = statistics()  # 864 values: three blocks of 256 and one of 96.
  got = nest(x)
  flat = x.T.reshape(-1)
  np.testing.assert_allclose(got.offset, flat.mean(), rtol=1e-6)
  centred = flat - np.float32(got.offset)
  absmax = [np.abs(centred[k : k + 256]).max() for k in range(0, 864, 256)]
  np.testing.assert_array_equal(got.nested_absmax, absmax)
  assert got.codes.shape == x.shape and got.codes.dtype == np.uint8


def test_the_encoder_takes_the_nearest_code():
  x = statistics(64, 128, seed=1)
  got = nest(x)
  centred = np.float64((x - np.float32(got.offset)).T.reshape(-1, 256))
  scale = np.float64(got.nested_absmax)[:, None]
  table = np.float64(dynamic.table())
  grid = table[None, None] * scale[:, :, None]
  error = np.abs(centred[:, :, None] - grid)
  codes = np.asarray(got.codes).T.reshape(-1, 256)
  taken = np.take_along_axis(error, codes[:, :, None].astype(int), 2)[..., 0]
  # Where two codes are equally near, to float32 rounding, either will do.
  assert (taken <= error.min(2) + 1e-7 * scale).all()


def test_equal_statistics_are_kept_exactly():
  x = np.full((4, 80), 0.7, np.float32)
  got = nest(x)
  np.testing.assert_allclose(got.dequantize(), x, rtol=2e-7)
  zeros = nest(np.zeros((4, 80), np.float32))
  np.testing.assert_array_equal(zeros.dequantize(), 0.0)


def test_against_bitsandbytes_blockwise_state():
  torch = pytest.importorskip("torch")
  functional = pytest.importorskip("bitsandbytes.functional")
  x = statistics(64, 512, seed=2)
  got = nest(x)
  flat = torch.tensor(x.T.reshape(-1).copy())
  offset = flat.mean()
  codes, state = functional.quantize_blockwise(flat - offset, blocksize=256)
  np.testing.assert_allclose(got.offset, offset.numpy(), rtol=1e-6)
  np.testing.assert_allclose(
      got.nested_absmax, state.absmax.numpy(), atol=2e-6)
  differ = codes.numpy() != np.asarray(got.codes).T.reshape(-1)
  assert differ.mean() < 0.005  # Its encoder misses the nearest in 0.2%.
