"""The dynamic 8-bit maps."""

from __future__ import annotations

import hashlib

import jax
import numpy as np
import pytest

from lora_jax.quant import dynamic

# Of bitsandbytes 0.50.2, create_dynamic_map(signed).numpy().tobytes().
SHA256 = {
    True: "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c",
    False: "305f002cc11278fb769d13b25b9fd0c7c83c8402c40a878fe086f4039fde6398",
}


@pytest.mark.parametrize("signed", SHA256)
def test_the_map_is_bitsandbytes_map(signed):
  table = dynamic.table(signed)
  assert hashlib.sha256(table.tobytes()).hexdigest() == SHA256[signed]
  assert (np.diff(table) > 0).all() and table[255] == 1
  assert table[127 if signed else 0] == 0


@pytest.mark.parametrize("signed", SHA256)
def test_the_map_against_the_installed_bitsandbytes(signed):
  functional = pytest.importorskip("bitsandbytes.functional")
  np.testing.assert_array_equal(
      dynamic.table(signed),
      functional.create_dynamic_map(signed=signed).numpy())


@pytest.mark.parametrize("signed", SHA256)
def test_codes_are_the_nearest(signed):
  rng = np.random.default_rng(0)
  values = np.float32(np.exp(-14 * rng.random(2000)))
  if signed:
    values *= rng.choice([-1, 1], 2000).astype(np.float32)
  table = np.float64(dynamic.table(signed))
  codes = jax.jit(dynamic.encode, static_argnums=1)(values, signed)
  error = np.abs(np.float64(values)[:, None] - table)
  # Ties within the middles' float32 rounding may go either way.
  taken = np.take_along_axis(error, np.asarray(codes, int)[:, None], 1)[:, 0]
  assert (taken <= error.min(1) * (1 + 1e-6)).all()
  np.testing.assert_array_equal(
      dynamic.decode(codes, signed), np.float32(table)[np.asarray(codes)])
