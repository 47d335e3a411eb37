"""Dynamic 8-bit codes: a decade in unary, and a linear fraction behind it.

The "dynamic tree quantisation" of arXiv:1511.04561 as bitsandbytes tabulates
it. Nearly relative precision over seven decades: what statistics of weights
(`double`) and moments of gradients (`train.adam8bit`) are stored in.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np


def _linspace(count: int) -> np.ndarray:
  """float32 `[count]` from 0.1 to 1, rounded as torch does.

  From both ends, each a fused multiply-add: float64 holds the product exactly.
  """
  start, end = np.float32(0.1), np.float32(1)
  step = np.float64((end - start) / np.float32(count - 1))
  index = np.arange(count)
  values = np.where(index < count // 2,
                    start + step * index, end - step * (count - 1 - index))
  return values.astype(np.float32)


@functools.cache
def table(signed: bool = True) -> np.ndarray:
  """float32 `[256]`, ascending: bitsandbytes' `create_dynamic_map(signed)`.

  Seven decades from 1e-6 to 1; each has twice as many fractions as the one
  below. Zero and 1 fill the two remaining places.

  Args:
    signed: whether the fractions come with both signs; without, there are
      twice as many in a decade.
  """
  values = [np.asarray([0.0, 1.0], np.float32)]
  for exponent in range(7):
    edges = _linspace(2 ** (exponent + (not signed)) + 1)
    means = (edges[:-1] + edges[1:]) / np.float32(2)
    means = np.float32(10.0 ** (exponent - 6)) * means
    values += [means, -means] if signed else [means]
  found = np.sort(np.concatenate(values))
  found.flags.writeable = False
  return found


def decode(codes: jax.Array, signed: bool = True) -> jax.Array:
  """`table(signed)[codes]`, float32 of any shape."""
  return jnp.asarray(table(signed)).at[codes].get(mode="promise_in_bounds")


def encode(values: jax.Array, signed: bool = True) -> jax.Array:
  """uint8 codes of the table's nearest values, of the shape of `values`.

  Args:
    values: float32, at most 1 in magnitude.
    signed: of the table.
  """
  known = table(signed)
  middles = (known[:-1] + known[1:]) / np.float32(2)
  return jnp.searchsorted(jnp.asarray(middles), values).astype(jnp.uint8)
