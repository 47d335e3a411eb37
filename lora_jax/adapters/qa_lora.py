"""QA-LoRA: one A for a group of inputs (Xu et al. 2023, arXiv 2309.14717).

  h = x W0 + s pool(dropout(x)) A B        s = alpha / r

where pool `[i] -> [i/g]` takes the mean of every g inputs, times i/g (Hugging
Face PEFT's scale), A `[i/g, r]` ~ U(-sqrt(g/i), sqrt(g/i)) and B `[r, o]` = 0
at init. The change of W0 is the same in all rows of a group: where a weight
is quantised in groups of g inputs with zero points, it is a change of these.

PEFT has it on GPTQ bases only, and cannot merge it; here any base will do, and
merging is into a plain weight.

Trainable parameters: r (i/g + o) a matrix.
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
from lora_jax.adapters import starts


@dataclasses.dataclass(frozen=True)
class Options:
  """Attributes:

    group_size: g, which must divide the inputs of every target.
  """

  group_size: int = 16

  def validate(self) -> None:
    """Raises `errors.UsageError` on a bad value."""
    if self.group_size < 1:
      raise errors.UsageError(
          f"adapter.options.group_size={self.group_size} is out of range; use "
          "an integer of at least 1")


@struct.dataclass
class QALoRA(lora.LoRA):
  """LoRA's fields, but:

    a: `[i/g, r]`.
    g: inputs of a group.
  """

  a: types.Array = base.trained(None, None)
  g: int = base.static(default=1)

  def down_up(self, x):
    groups = self.a.shape[0]
    pooled = x.reshape(*x.shape[:-1], groups, self.g).astype(jnp.float32)
    pooled = (jnp.mean(pooled, -1) * groups).astype(x.dtype)
    return super().down_up(pooled)

  def factors(self):
    return self.spread(), self.scale * self.b

  def spread(self):
    """A as it is for single inputs, `[i, r]`."""
    return jnp.repeat(self.a, self.g, axis=0) * (self.a.shape[0] / self.g)

  def delta(self):
    return jnp.matmul(*self.factors(), precision="highest")

  @classmethod
  def from_peft(cls, tensors, slot):
    plain = lora.LoRA.from_peft(tensors, slot)
    return cls(a=plain.a, b=plain.b, g=slot.options.group_size,
               **slot.values())


def init(key, weight, slot, shared=None):
  """The adapter of one module before the first step."""
  del shared
  (i, o), g = weight.shape[-2:], slot.options.group_size
  if i % g:
    raise errors.UsageError(
        f"adapter.options.group_size={g} does not divide the {i} inputs of "
        f"{slot.target}; use another, or leave it out of adapter.targets")
  if slot.given is not None:
    raise errors.UsageError(
        "adapter.init takes A of single inputs out of the weight; use "
        "adapter.init=default")
  a, b = starts.kaiming(key, i // g, o, slot.width, slot.rank)
  return QALoRA(a=a, b=b, g=g, **slot.values())


METHOD = method.Method(
    summary="h = x W0 + (alpha/r) pool(x) A B", paper="arXiv 2309.14717",
    adapter=QALoRA, init=init, count="r * (i // group_size + o)",
    options=Options, patterns=True, zero_gradients=("a",))
