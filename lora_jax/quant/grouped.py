"""Groups of integers as GPTQ and AWQ store them: read, never written."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lora_jax import mesh as mesh_lib
from lora_jax import struct
from lora_jax import types
from lora_jax.kernels import exact
from lora_jax.quant import base
from lora_jax.quant import double


@struct.dataclass(kw_only=True)
class Grouped(base.QuantizedArray):
  """`w = scale * (code - zero)`, rounded to the type of the scales.

  GPTQ (arXiv:2210.17323) and AWQ (arXiv:2306.00978) choose the codes from
  data, which is why no `QuantSpec` names this class: there is no `quantize`.
  Both compute the product in float16, the scales' type. A scale of 11 bits
  times a difference of at most 9 is exact in float32, so that one rounding
  gives their weights bit for bit, whatever type is asked for.

  A group is a block of `block_size` rows. Under act-order ("desc_act") GPTQ
  numbers the groups by the size of the activations: the codes are then stored
  in the order of the groups, and `rows` says where each row of the weight is.

  Attributes:
    codes: uint8 `[i / 2, o]` with two codes of 2 to 4 bits a byte.
    scales: `[q, o]` in the checkpoint's float type.
    zeros: uint8 `[q, o]`.
    rows: int32 `[i]`, row of the weight -> row of the codes; None is the
      same.
  """

  zeros: types.Array = mesh_lib.axes("in", "out")
  rows: types.Array | None = None

  @classmethod
  def decode(
      cls, codes: jax.Array, statistics: dict[str, jax.Array]
  ) -> jax.Array:
    scales, zeros = statistics["scales"], statistics["zeros"]
    steps = codes.astype(jnp.int32) - zeros.astype(jnp.int32)
    product = steps.astype(jnp.float32) * scales.astype(jnp.float32)
    return exact.cast(product, scales.dtype).astype(jnp.float32)

  def statistics(self) -> dict[str, jax.Array]:
    return {"scales": double.unnest(self.scales),
            "zeros": jnp.asarray(self.zeros)}

  @property
  def extensible(self) -> bool:
    return self.rows is None and super().extensible

  def dequantize(self, dtype: Any = jnp.float32, below=None) -> jax.Array:
    values = super().dequantize(dtype, below)
    if self.ndim > 2 or self.rows is None:  # Each layer has been reordered.
      return values
    return values.at[jnp.asarray(self.rows)].get(mode="promise_in_bounds")


@struct.dataclass(kw_only=True)
class Grouped8(Grouped):
  """The same with a byte a code: `codes` is uint8 `[i, o]`."""

  CODES_PER_BYTE: ClassVar[int] = 1
