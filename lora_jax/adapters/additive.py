"""What all methods share that add something to a frozen product.

  h = x W0 + dropout(x) D,  D `[i, o]` often A B of few columns

A subclass gives `factors` where D = A B; else, or where there is a better way,
`down_up` (x D, without making D) and `delta`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from lora_jax import quant
from lora_jax import struct
from lora_jax import types
from lora_jax.adapters import base


@struct.dataclass
class Additive(base.Adapter):
  """A projection's adapter, whose field `rate` is its input's dropout."""

  if TYPE_CHECKING:
    rate: types.Array

  def apply(self, x, weight, noise=None):
    y = quant.matmul(x, weight)
    if noise is not None:
      x = noise.dropout(x, self.rate)
    return y + self.down_up(x)

  def down_up(self, x):
    a, b = (factor.astype(x.dtype) for factor in self._factors())
    return (x @ a) @ b

  def delta(self) -> jax.Array:
    """D, `[i, o]` float32."""
    a, b = self._factors()
    return jnp.matmul(a, b, precision="highest")

  def merge(self, weight):
    return quant.dequantize(weight, jnp.float32) + self.delta()

  def _factors(self) -> tuple[types.Array, types.Array]:
    found = self.factors()
    assert found is not None  # Else the method gives `delta`.
    return found
