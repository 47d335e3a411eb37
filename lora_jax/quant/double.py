"""Double quantisation: 8-bit codes for the statistics of the blocks.

QLoRA (arXiv:2305.14314, section 3, "Double Quantization") as bitsandbytes
does it: the mean is subtracted, and blocks of 256 values are coded by a signed
dynamic map (arXiv:1511.04561) instead of the paper's FP8. The encoder takes
the nearest code; bitsandbytes' own on CPU misses it for 0.2% of the values.
"""

from __future__ import annotations

from typing import TypeAlias

import jax
import jax.numpy as jnp

from lora_jax import mesh as mesh_lib
from lora_jax import struct
from lora_jax import types
from lora_jax.kernels import exact
from lora_jax.quant import dynamic

BLOCK = 256


@struct.dataclass
class Nested:
  """Float32 `[q, o]` in 8 bits; the arrays may carry leading axes.

  Attributes:
    codes: uint8 `[q, o]`, indices into `dynamic.table()`.
    nested_absmax: float32 `[ceil(q * o / 256)]`, one per 256 values in
      bitsandbytes' order, in which value `(n, o)` is number `o * q + n`.
    offset: float32 `[]`, the mean.
  """

  codes: types.Array = mesh_lib.axes("in", "out")
  nested_absmax: types.Array = mesh_lib.axes(None)
  offset: types.Array = mesh_lib.axes()

  def dequantize(self) -> jax.Array:
    """`map[codes] * nested_absmax + offset`, float32 `[q, o]`, unfused."""
    rows, out = self.codes.shape
    # On the device: as a constant of the program it would be megabytes.
    number = jnp.arange(out)[None] * rows + jnp.arange(rows)[:, None]
    value = dynamic.decode(self.codes)
    scale = jnp.asarray(self.nested_absmax)[number // BLOCK]
    return exact.rounded(value * scale) + self.offset


def nest(x: jax.Array) -> Nested:
  """Codes float32 `[q, o]` in 8 bits."""
  rows, out = x.shape
  offset = exact.rounded(jnp.mean(x))  # A sum times 1/n, subtracted below.
  flat = (x - offset).T.reshape(-1)
  blocks = jnp.pad(flat, (0, -flat.size % BLOCK)).reshape(-1, BLOCK)
  absmax = jnp.max(jnp.abs(blocks), axis=1)
  unit = blocks * exact.reciprocal(absmax)[:, None]
  codes = dynamic.encode(unit)
  codes = codes.reshape(-1)[: flat.size].reshape(out, rows).T
  return Nested(codes=codes, nested_absmax=absmax, offset=offset)


Statistic: TypeAlias = types.Array | Nested  # `[q, o]`.


def unnest(x: Statistic) -> jax.Array:
  """The float32 `[q, o]` that `x` is or stands for."""
  return x.dequantize() if isinstance(x, Nested) else jnp.asarray(x)


@jax.jit
def unnested(x: Nested) -> jax.Array:
  """float32 `[..., q, o]` of a stack; layer by layer, to need no more."""
  if x.codes.ndim == 2:
    return x.dequantize()
  return jax.lax.map(unnested, x)
