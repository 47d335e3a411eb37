"""BitFit: only biases are trained (Ben Zaken et al. 2022, arXiv 2106.10199).

  h = x W0 + bias + b

with b `[o]` = 0 at init. A projection without a bias, as in Llama, gets one.
Hugging Face PEFT calls it BEFT (its paper, arXiv 2509.15974, trains the bias of
v_proj alone: `adapter.targets=v_proj`).

Trainable parameters: o a matrix.
"""

from __future__ import annotations

import jax.numpy as jnp

from lora_jax import quant
from lora_jax import struct
from lora_jax import types
from lora_jax.adapters import base
from lora_jax.adapters import method


@struct.dataclass
class Bias(base.Adapter):
  """Attributes:

    b: `[o]`.
    rank: `[]` int32, 0: not adapted.
  """

  b: types.Array = base.up("out")
  rank: types.Array = base.frozen()

  def apply(self, x, weight, noise=None):
    del noise
    return quant.matmul(x, weight)

  def shift(self, bias):
    added = self.active(self.b, 0.0)
    return added if bias is None else bias + added

  def merge(self, weight):
    return quant.dequantize(weight, jnp.float32)

  def to_peft(self, embedding=False):
    return {"beft_bias": self.b[None]}

  @classmethod
  def from_peft(cls, tensors, slot):
    return cls(b=jnp.asarray(tensors["beft_bias"], jnp.float32)[0],
               rank=slot.rank)


def init(key, weight, slot, shared=None):
  """The adapter of one module before the first step."""
  del key, shared
  return Bias(b=jnp.zeros(weight.shape[-1], jnp.float32), rank=slot.rank)


METHOD = method.Method(
    summary="h = x W0 + bias + b", paper="arXiv 2106.10199", adapter=Bias,
    init=init, count="o", ranked=False,
    form=method.Form(
        peft_type="BEFT", config=lambda config: {"init_weights": True},
        block=lambda config: {}))
