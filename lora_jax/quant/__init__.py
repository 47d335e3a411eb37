"""Quantised weights: NF4, FP4, INT4, INT8, LLM.int8; nested statistics.

  spec = quant.QuantSpec(format="nf4", block_size=64, double=True)
  w = quant.quantize(weight, spec)   # [i, o] -> QuantizedArray
  y = quant.matmul(x, w)             # [..., i] -> [..., o]

A new format is one file with a subclass of `QuantizedArray` and one row of
`FORMATS`.
"""

from lora_jax.quant.base import Computed
from lora_jax.quant.base import QuantizedArray
from lora_jax.quant.base import QuantSpec
from lora_jax.quant.base import WHOLE
from lora_jax.quant.joint import matmul as joint_matmul
from lora_jax.quant.linear import cross
from lora_jax.quant.linear import matmul
from lora_jax.quant.linear import take
from lora_jax.quant.registry import bits_per_parameter
from lora_jax.quant.registry import check
from lora_jax.quant.registry import dequantize
from lora_jax.quant.registry import FORMATS
from lora_jax.quant.registry import quantize
from lora_jax.quant.registry import spec_of

__all__ = [
    "FORMATS",
    "WHOLE",
    "Computed",
    "QuantSpec",
    "QuantizedArray",
    "bits_per_parameter",
    "check",
    "cross",
    "dequantize",
    "joint_matmul",
    "matmul",
    "quantize",
    "spec_of",
    "take",
]
