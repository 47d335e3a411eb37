"""INT8: 255 levels around zero, one scale a block and column."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import struct
from lora_jax.kernels import exact
from lora_jax.quant import base


@struct.dataclass(kw_only=True)
class Int8(base.QuantizedArray):
  """`w = code * scale`, `scale = absmax / 127`; int8 codes `[i, o]`."""

  CODES_PER_BYTE: ClassVar[int] = 1

  @classmethod
  def encode(cls, w: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    scales = jnp.max(jnp.abs(w), axis=1) * np.float32(1 / 127)
    unit = w * exact.reciprocal(scales)[:, None]
    codes = jnp.clip(jnp.round(unit), -127, 127).astype(jnp.int8)
    return codes, {"scales": scales}

  @classmethod
  def decode(
      cls, codes: jax.Array, statistics: dict[str, jax.Array]
  ) -> jax.Array:
    return codes.astype(jnp.float32) * statistics["scales"]
