"""Double quantisation: 8-bit codes for the statistics of the blocks.

QLoRA (arXiv:2305.14314, section 3, "Double Quantization") as bitsandbytes
does it: the mean is subtracted, and blocks of 256 values are coded by a signed
dynamic map (arXiv:1511.04561) instead of the paper's FP8. The encoder takes
the nearest code; bitsandbytes' own on CPU misses it for 0.2% of the values.
"""

from __future__ import annotations

import functools
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import mesh as mesh_lib
from lora_jax import struct
from lora_jax import types
from lora_jax.kernels import exact

BLOCK = 256


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
def dynamic_map() -> np.ndarray:
  """float32 `[256]`, ascending: bitsandbytes' `create_dynamic_map()`.

  Seven decades from 1e-6 to 1; each has twice as many fractions as the one
  below. Zero and 1 fill the two remaining places.
  """
  values = [np.asarray([0.0, 1.0], np.float32)]
  for exponent in range(7):
    edges = _linspace(2**exponent + 1)
    means = (edges[:-1] + edges[1:]) / np.float32(2)
    means = np.float32(10.0 ** (exponent - 6)) * means
    values += [means, -means]
  table = np.sort(np.concatenate(values))
  table.flags.writeable = False
  return table


@struct.dataclass
class Nested:
  """Float32 `[q, o]` in 8 bits; the arrays may carry leading axes.

  Attributes:
    codes: uint8 `[q, o]`, indices into `dynamic_map`.
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
    table = jnp.asarray(dynamic_map())
    value = table.at[self.codes].get(mode="promise_in_bounds")
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
  table = dynamic_map()
  middles = (table[:-1] + table[1:]) / np.float32(2)
  codes = jnp.searchsorted(jnp.asarray(middles), unit).astype(jnp.uint8)
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
