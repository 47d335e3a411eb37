"""Mixtures of LoRAs: a router weighs experts, token by token.

  h = x W0 + s sum_k g_k(x) dropout(x) A_k B_k      g = softmax(x R)

with K experts A_k `[i, r]`, B_k `[r, o]` and a router R `[i, K]` of every
projection (MoLoRA, Zadouri et al. 2023, arXiv 2309.05444; LoRAMoE, Dou et al.,
2312.09979), s = alpha / r. With `top` = n only the n largest of a token's
logits are in the softmax (MixLoRA, Li et al. 2024, 2404.15159, without its
loss of balance). A_k starts as LoRA's A, B_k at 0, R ~ N(0, 0.02^2) as
MixLoRA's, so that h = x W0.

What is added depends on x by more than a product: it cannot be merged.

Trainable parameters: K r (i + o) + K i a matrix.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from lora_jax import errors
from lora_jax import quant
from lora_jax import struct
from lora_jax import types
from lora_jax.adapters import base
from lora_jax.adapters import method


@dataclasses.dataclass(frozen=True)
class Options:
  """Attributes:

    experts: K.
    top: experts of a token; 0 is all.
  """

  experts: int = 4
  top: int = 0

  def validate(self) -> None:
    """Raises a `UsageError` if a value is out of range."""
    if not 2 <= self.experts <= 256:
      raise errors.UsageError(
          f"adapter.options.experts={self.experts} is out of range; use an "
          "integer from 2 to 256")
    if not 0 <= self.top <= self.experts:
      raise errors.UsageError(
          f"adapter.options.top={self.top} is out of range; use an integer "
          f"from 1 to experts={self.experts}, or 0 for all")


@struct.dataclass
class Mixture(base.Adapter):
  """Attributes:

    a: `[K, i, r]`.
    b: `[K, r, o]`.
    router: `[i, K]`, R.
    scale: `[]`, s.
    rate: `[]`, dropout rate; of what the experts see, not the router.
    rank: `[]` int32, r of this layer (0: not adapted); what is wider is not
      used.
    top: static.
  """

  a: types.Array = base.trained("in", None)
  b: types.Array = base.up(None, "out")
  router: types.Array = base.trained("in", None)
  scale: types.Array = base.frozen()
  rate: types.Array = base.frozen()
  rank: types.Array = base.frozen()
  top: int = base.static(default=0)

  def gates(self, x: types.Array) -> jax.Array:
    """g `[..., K]` float32 of x `[..., i]`."""
    logits = jnp.matmul(
        x, self.router.astype(x.dtype), preferred_element_type=jnp.float32)
    if self.top:
      _, chosen = jax.lax.top_k(logits, self.top)
      kept = jax.nn.one_hot(chosen, logits.shape[-1]).sum(-2) > 0
      logits = jnp.where(kept, logits, -jnp.inf)
    return jax.nn.softmax(logits)

  def apply(self, x, weight, noise=None):
    y = quant.matmul(x, weight)
    gates = self.gates(x)
    if noise is not None:
      x = noise.dropout(x, self.rate)
    dtype = x.dtype
    used = self.scale * (jnp.arange(self.a.shape[-1]) < self.rank)
    h = jnp.einsum("...i,kir->...kr", x, self.a.astype(dtype))
    h = h * (gates[..., None] * used).astype(dtype)
    return y + jnp.einsum("...kr,kro->...o", h, self.b.astype(dtype))

  def merge(self, weight):
    del weight
    raise errors.UserError(
        "a mixture weighs its experts by what it is given, and is no weight: "
        "it cannot be merged (use --format=peft), nor stand before a method "
        "that needs the weight itself")

  def size(self) -> int:
    experts, i, o = self.a.shape[-3], self.a.shape[-2], self.b.shape[-1]
    return experts * (int(self.rank.sum()) * (i + o)
                      + int((self.rank > 0).sum()) * i)

  def to_peft(self, embedding=False):
    r = int(self.rank)
    return {"a": self.a[..., :r], "b": self.b[:, :r], "router": self.router}

  @classmethod
  def from_peft(cls, tensors, slot):
    pad = slot.width - tensors["a"].shape[-1]
    return cls(
        a=jnp.pad(tensors["a"], ((0, 0), (0, 0), (0, pad))),
        b=jnp.pad(tensors["b"], ((0, 0), (0, pad), (0, 0))),
        router=jnp.asarray(tensors["router"], jnp.float32),
        top=slot.options.top, **slot.values())

  @classmethod
  def peft_rank(cls, tensors):
    return tensors["a"].shape[-1]


def init(key, weight, slot, shared=None):
  """The adapter of one module before the first step; see `starts`."""
  del shared
  (i, o), experts = weight.shape[-2:], slot.options.experts
  first, second = jax.random.split(key)
  pairs = [slot.start.draw(k, i, o, slot.width, slot.rank)
           for k in jax.random.split(first, experts)]
  a, b = (jnp.stack(x) for x in zip(*pairs, strict=True))
  return Mixture(
      a=a, b=b, router=0.02 * jax.random.normal(second, (i, experts)),
      top=slot.options.top, **slot.values())


METHOD = method.Method(
    summary="h = x W0 + (alpha/r) sum_k softmax(x R)_k x A_k B_k",
    paper="arXiv 2309.05444", adapter=Mixture, init=init,
    count="experts * (r * (i + o) + i)", options=Options, patterns=True,
    mergeable=False, zero_gradients=("a", "router"),
    tiny={"options": {"experts": 3, "top": 2}})
