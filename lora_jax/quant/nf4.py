"""NF4, the 4-bit NormalFloat of QLoRA (arXiv:2305.14314, section 3)."""

from __future__ import annotations

from typing import ClassVar

from lora_jax import struct
from lora_jax.quant import codebook


@struct.dataclass(kw_only=True)
class NF4(codebook.Codebook):
  """Quantiles of a normal distribution, scaled to [-1, 1], with an exact zero.

  Eight negative and seven positive quantiles at equal steps of probability
  from `1 - 929/960` to `929/960`, and zero (appendix E). The table is that of
  bitsandbytes, to which codes and scales are equal bit for bit.
  """

  VALUES: ClassVar[tuple[float, ...]] = (
      -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
      -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
      0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
      0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
      0.7229568362236023, 1.0)
