"""Codes to numbers without a lookup: what the kernels share.

Neither Mosaic compiler has a gather that is worth using on vectors of codes,
so a table is a tree of selects over the code's bits, and an arithmetic
progression is a conversion and an addition. Both are exact; the one product
and, where there are minimums, the one sum round as the plain path does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.kernels import exact

Levels: TypeAlias = tuple[float, ...]  # By code, 16 of them.


def lookup(codes: jax.Array, levels: Levels) -> jax.Array:
  """float32 `levels[code]` of int32 codes 0 to 15, of any shape."""
  first = levels[0]
  if levels == tuple(first + k for k in range(16)) and first == int(first):
    values = codes.astype(jnp.float32)
    return values + np.float32(first) if first else values
  zero = [(codes & (1 << k)) == 0 for k in range(4)]
  found: list = [np.float32(v) for v in levels]
  for bit in zero:
    found = [jnp.where(bit, low, high)
             for low, high in zip(found[::2], found[1::2], strict=True)]
  return found[0]


def decode(
    codes: jax.Array,
    scales: jax.Array,
    minimums: jax.Array | None,
    *,
    levels: Levels,
    dtype: jnp.dtype,
    find: Callable[[jax.Array, Levels], jax.Array] = lookup,
) -> jax.Array:
  """`levels[code] * scale (+ minimum)`, rounded once to `dtype`.

  Args:
    codes: int32, 0 to 15.
    scales: float32, of a shape that broadcasts to that of `codes`.
    minimums: the same, or None.
    levels: what a code stands for, before it is scaled.
    dtype: bfloat16, float16 or float32.
    find: the level of each code.

  Returns:
    Values of the shape of `codes`. A kernel's output is opaque to XLA, so that
    a plain conversion is the one rounding that `exact.cast` promises.
  """
  values = find(codes, levels) * scales
  if minimums is not None:
    values = exact.rounded(values) + minimums
  if dtype == jnp.float32:
    values = exact.rounded(values)  # As `exact.cast` does, infinities too.
  return values.astype(dtype)
