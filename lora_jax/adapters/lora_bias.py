"""LoRA with a bias in its up projection (Hugging Face PEFT's `lora_bias`).

  h = x W0 + s (dropout(x) A B + c)        s = alpha / r

with c `[o]` = 0 at init, and the rest as in `lora`. It is what the difference
of two models with biases is approximated by, such as one taken out of a
fine-tuned model; A and B alone cannot move a bias.

Trainable parameters: r (i + o) + o a matrix.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from lora_jax import errors
from lora_jax import struct
from lora_jax import types
from lora_jax.adapters import base
from lora_jax.adapters import lora
from lora_jax.adapters import method


@struct.dataclass
class BiasedLoRA(lora.LoRA):
  """LoRA's fields, and:

    c: `[o]`.
  """

  c: types.Array = base.up("out", default=None)

  def shift(self, bias):
    added = self.scale * self.c  # Where nothing is adapted the scale is 0.
    return added if bias is None else bias + added

  def size(self) -> int:
    return super().size() + int((self.rank > 0).sum()) * self.c.shape[-1]

  def inert(self):
    return dataclasses.replace(super().inert(), c=0 * self.c)

  def to_peft(self, embedding=False):
    return super().to_peft(embedding) | {"lora_B.bias": self.c}

  @classmethod
  def from_peft(cls, tensors, slot):
    plain = lora.LoRA.from_peft(tensors, slot)
    return cls(a=plain.a, b=plain.b, **slot.values(),
               c=jnp.asarray(tensors["lora_B.bias"], jnp.float32))


def init(key, weight, slot, shared=None):
  """The adapter of one module before the first step."""
  if slot.given is not None:
    raise errors.UsageError(
        "adapter.init takes A and B out of the weight, which PEFT does not "
        "beside lora_bias; use adapter.init=default")
  plain = lora.init(key, weight, slot, shared)
  return BiasedLoRA(
      a=plain.a, b=plain.b, c=jnp.zeros(weight.shape[-1], jnp.float32),
      **slot.values())


METHOD = method.Method(
    summary="h = x W0 + (alpha/r) (x A B + c)", paper="PEFT's lora_bias",
    adapter=BiasedLoRA, init=init, count="r * (i + o) + o", patterns=True,
    zero_gradients=("a",), form=dataclasses.replace(
        lora.form(lora_bias=True),
        # PEFT wants no other start beside it; what it was is in the tensors.
        config=lambda c: lora.peft_config(c) | {
            "lora_bias": True, "init_lora_weights": True}))
