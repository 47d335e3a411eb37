"""Formats whose values are a table of 16 numbers times the block's scale."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import struct
from lora_jax.kernels import decode as decode_lib
from lora_jax.kernels import exact
from lora_jax.quant import base


@struct.dataclass(kw_only=True)
class Codebook(base.QuantizedArray):
  """`w = VALUES[code] * scale`, with `scale = absmax / PEAK`.

  The code counts the midpoints of neighbouring values that lie below
  `w * (1 / scale)`: a product with the reciprocal, as in bitsandbytes, since a
  quotient rounds differently once in a few million.

  A table lookup is the fastest decoding on CPU and on GPU alike; lookups of
  whole bytes, trees of selects and arithmetic were measured and are no
  faster.
  """

  VALUES: ClassVar[tuple[float, ...]]  # By code, 16 of them.
  PEAK: ClassVar[float] = 1.0  # The value that absmax is coded as.

  @classmethod
  def table(cls) -> np.ndarray:
    """float32 `[16]`: the value of every code."""
    return np.asarray(cls.VALUES, np.float32)

  @classmethod
  def levels(cls) -> decode_lib.Levels:
    return tuple(float(v) for v in cls.table())

  @classmethod
  def encode(cls, w: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    table = cls.table()
    order = np.argsort(table, kind="stable").astype(np.uint8)
    middles = (table[order[:-1]] + table[order[1:]]) / np.float32(2)
    scales = jnp.max(jnp.abs(w), axis=1) * np.float32(1 / cls.PEAK)
    unit = w * exact.reciprocal(scales)[:, None]
    codes = sum((unit > m).astype(jnp.uint8) for m in middles)
    if (order != np.arange(16)).any():
      codes = jnp.asarray(order).at[codes].get(mode="promise_in_bounds")
    return codes, {"scales": scales}

  @classmethod
  def decode(
      cls, codes: jax.Array, statistics: dict[str, jax.Array]
  ) -> jax.Array:
    table = jnp.asarray(cls.table())
    values = table.at[codes].get(mode="promise_in_bounds")
    return values * statistics["scales"]
