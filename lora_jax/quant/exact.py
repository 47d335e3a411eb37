"""float32 arithmetic with numpy's rounding on every backend, inside jit.

Stored codes and dequantised values are promised bit for bit, and compilers
take liberties: these three functions take them back.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def rounded(product: jax.Array) -> jax.Array:
  """Keeps a float32 product rounded before something is added to it.

  XLA contracts `a * b + c` to a fused multiply-add, which changes the last bit
  of 9% of the values. An `optimization_barrier` does not prevent that in jax
  0.10; a maximum in between does, and is the identity on all numbers here.
  """
  return jnp.maximum(product, jnp.float32(-3e38))


def _bits(x: jax.Array) -> jax.Array:
  return jax.lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: jax.Array) -> jax.Array:
  return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """`x` as a sum of two floats of 12 bits."""
  high = _float(_bits(x) & ~0xFFF)
  return high, x - high


def reciprocal(x: jax.Array) -> jax.Array:
  """`1 / x`, correctly rounded, for float32 `0 <= x < 2^127`.

  Finite at 0 (as if `x` were the smallest normal number), so that an all-zero
  block stays zero. On GPU XLA's division is off by one unit in the last place
  for 13% of the numbers. Here the mantissa's quotient is replaced by that
  neighbour whose product with the mantissa is nearest to 1; the products of
  halves are exact, so that contracting them changes nothing.
  """
  bits = _bits(jnp.maximum(x, np.finfo(np.float32).tiny))
  mantissa = _float((bits & 0x7FFFFF) | 0x3F800000)  # In [1, 2).
  m, n = _halves(mantissa)
  guess = _bits(1.0 / mantissa)
  best, least = _float(guess), None
  for step in (0, -1, 1):
    candidate = _float(guess + step)
    c, d = _halves(candidate)
    error = jnp.abs(1.0 - m * c - m * d - n * c - n * d)
    if least is None:
      least = error
    else:
      best = jnp.where(error < least, candidate, best)
      least = jnp.minimum(error, least)
  return best * _float((254 << 23) - (bits & 0x7F800000))


def cast(values: jax.Array, dtype: Any) -> jax.Array:
  """float32 -> `dtype` with exactly one rounding, whatever consumes it.

  XLA may drop a conversion to 16 bits that a conversion back to float32
  follows (`xla_allow_excess_precision`), but not a `reduce_precision`; and it
  contracts a float32 product and a later addition (see `rounded`).
  """
  dtype = jnp.dtype(dtype)
  if dtype == jnp.bfloat16:
    values = jax.lax.reduce_precision(values, 8, 7)
  elif dtype == jnp.float16:
    # reduce_precision flushes float16's subnormals, multiples of 2^-24.
    small = jnp.round(values * np.float32(2**24)) * np.float32(2**-24)
    values = jnp.where(jnp.abs(values) < 2**-14, small,
                       jax.lax.reduce_precision(values, 5, 10))
  else:
    values = rounded(values)
  return values.astype(dtype)
