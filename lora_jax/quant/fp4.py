"""FP4 as bitsandbytes defines it: sign, two exponent bits, one of fraction."""

from __future__ import annotations

from typing import ClassVar

from lora_jax import struct
from lora_jax.quant import codebook

_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


@struct.dataclass(kw_only=True)
class FP4(codebook.Codebook):
  """Magnitudes {0, 1/16, 2, 3, 4, 6, 8, 12} / 12; bit 3 is the sign.

  This is not E2M1 of the OCP formats: the subnormal is 1/16 instead of 1. Code
  8 is a second zero, taken by the smallest positive values as bitsandbytes
  does.
  """

  VALUES: ClassVar[tuple[float, ...]] = tuple(
      sign * m / 12 for sign in (1.0, -1.0) for m in _MAGNITUDES)
