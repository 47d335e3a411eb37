"""Rounding equal to numpy's inside jit."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.kernels import exact


def test_reciprocals_are_correctly_rounded():
  rng = np.random.default_rng(0)
  mantissas = rng.uniform(1, 2, 2**18)
  powers = 2.0 ** rng.integers(-60, 60, 2**18)
  x = np.float32(np.concatenate(
      [mantissas * powers, 2.0 ** np.arange(-126, 127)]))
  np.testing.assert_array_equal(
      jax.jit(exact.reciprocal)(x), np.float32(1) / x)


@pytest.mark.parametrize("ulps", [-1, 1])
def test_a_quotient_one_ulp_off_is_repaired(monkeypatch, ulps):
  """GPUs divide like that; CPUs divide exactly, so it is forced here."""
  x = np.float32(np.random.default_rng(1).uniform(1.001, 1.999, 2**16))
  off = (np.float32(1) / x).view(np.int32) + np.int32(ulps)
  bits, calls = exact._bits, []

  def shifted(value):
    calls.append(value)
    if len(calls) < 3:
      return bits(value)
    if len(calls) == 3:  # The quotient, after `x` and its mantissa.
      np.testing.assert_allclose(value, np.float32(1) / x, rtol=2e-7)
      return jnp.asarray(off)
    return bits(value)

  monkeypatch.setattr(exact, "_bits", shifted)
  np.testing.assert_array_equal(
      exact.reciprocal(jnp.asarray(x)), np.float32(1) / x)


def test_the_reciprocal_of_zero_is_finite():
  assert np.isfinite(jax.jit(exact.reciprocal)(jnp.zeros(3))).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_one_rounding_to_16_bits(dtype):
  """Every magnitude, subnormals of float16 and ties to even among them."""
  exponents = np.arange(-30, 15)[:, None]
  mantissas = 1 + np.arange(2**13) / 2**13
  x = np.float32(np.concatenate([s * mantissas * 2.0**exponents
                                 for s in (1, -1)]))
  got = jax.jit(lambda x: exact.cast(x, dtype).astype(jnp.float32))(x)
  np.testing.assert_array_equal(got, x.astype(dtype).astype(np.float32))


def test_the_exactness_test_can_fail():
  """XLA on CPU does contract a bare multiply-then-add, so `rounded` matters."""
  if jax.default_backend() != "cpu":
    pytest.skip("the contraction was observed on CPU")
  a, b, c = (np.random.default_rng(seed).standard_normal((256, 64), np.float32)
             for seed in (1, 2, 3))
  # Only optimised code contracts; see tests/conftest.py.
  jit = functools.partial(
      jax.jit, compiler_options={"xla_backend_optimization_level": 3})
  bare = jit(lambda a, b, c: a * b + c)(a, b, c)
  kept = jit(lambda a, b, c: exact.rounded(a * b) + c)(a, b, c)
  np.testing.assert_array_equal(kept, a * b + c)
  assert (np.asarray(bare) != a * b + c).mean() > 0.01
