"""LLM.int8 weights: one scale an output column, bytes as in bitsandbytes."""

from __future__ import annotations

from typing import ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import struct
from lora_jax.kernels import exact
from lora_jax.quant import base

# 127 / 2^-118 is still finite; float16 weights are 2^-24 or more.
_LEAST = 2.0**-118


@struct.dataclass(kw_only=True)
class LLMInt8(base.QuantizedArray):
  """`w = code * absmax / 127`; int8 codes `[i, o]`, scales `[1, o]`.

  Vector-wise quantisation of LLM.int8 (arXiv:2208.07339, section 2). Codes and
  absmax equal those of bitsandbytes' `int8_vectorwise_quant`, and values its
  `int8_vectorwise_dequant`, bit for bit. The paper's decomposition keeps
  outlier *activations* in 16 bits and concerns no stored weight: products here
  are in the compute type throughout, and need none.

  A block is a whole column, and its absmax is float32: `QuantSpec.block_size`
  and `double` do not apply.
  """

  CODES_PER_BYTE: ClassVar[int] = 1

  @classmethod
  def quantize(cls, w: jax.Array, spec: base.QuantSpec) -> Self:
    del spec
    whole = base.QuantSpec("llm_int8", block_size=base.WHOLE, double=False)
    return super().quantize(w, whole)

  @classmethod
  def encode(cls, w: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    absmax = jnp.max(jnp.abs(w), axis=1)
    # torch divides a number by a tensor by way of the reciprocal.
    scale = exact.reciprocal(jnp.maximum(absmax, _LEAST)) * np.float32(127)
    return jnp.round(w * scale[:, None]).astype(jnp.int8), {"scales": absmax}

  @classmethod
  def decode(
      cls, codes: jax.Array, statistics: dict[str, jax.Array]
  ) -> jax.Array:
    # Two roundings, in bitsandbytes' order.
    return (codes.astype(jnp.float32) * statistics["scales"]
            ) * np.float32(7.874015718698502e-3)
