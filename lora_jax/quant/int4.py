"""INT4: 15 levels around zero, or 16 levels from the minimum to the maximum."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import mesh as mesh_lib
from lora_jax import struct
from lora_jax.kernels import decode as decode_lib
from lora_jax.kernels import exact
from lora_jax.quant import base
from lora_jax.quant import codebook
from lora_jax.quant import double


@struct.dataclass(kw_only=True)
class Int4(codebook.Codebook):
  """Symmetric: `w = (code - 8) * scale`, `scale = absmax / 7`.

  Codes are 1 to 15; code 0 (-8) is never written, so that the grid has a zero
  and is the same for `w` and `-w`.
  """

  VALUES: ClassVar[tuple[float, ...]] = tuple(float(k) for k in range(-8, 8))
  PEAK: ClassVar[float] = 7.0


@struct.dataclass(kw_only=True)
class Int4Affine(base.QuantizedArray):
  """Asymmetric: `w = code * scale + minimum`, `scale = (max - min) / 15`.

  Attributes:
    minimums: float32 `[q, o]`, or the same nested.
  """

  minimums: double.Statistic = mesh_lib.axes("in", "out")

  @classmethod
  def levels(cls) -> decode_lib.Levels:
    return tuple(float(k) for k in range(16))

  @classmethod
  def encode(cls, w: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    minimums = jnp.min(w, axis=1)
    scales = (jnp.max(w, axis=1) - minimums) * np.float32(1 / 15)
    unit = (w - minimums[:, None]) * exact.reciprocal(scales)[:, None]
    codes = jnp.clip(jnp.round(unit), 0, 15).astype(jnp.uint8)
    return codes, {"scales": scales, "minimums": minimums}

  @classmethod
  def decode(
      cls, codes: jax.Array, statistics: dict[str, jax.Array]
  ) -> jax.Array:
    product = codes.astype(jnp.float32) * statistics["scales"]
    return exact.rounded(product) + statistics["minimums"]

  def statistics(self) -> dict[str, jax.Array]:
    return {"scales": double.unnest(self.scales),
            "minimums": double.unnest(self.minimums)}
