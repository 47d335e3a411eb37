"""DoRA: weight-decomposed low-rank adaptation (Liu et al. 2024, 2402.09353).

  V = W0 + s A B,   c = ||V|| per output column,   W' = (m / c) V    (eq. 5)

with c treated as a constant by the gradient (section 4.3), recomputed every
step, and m `[o]` initialised to ||W0|| of the *dequantised* weight, so that
W' = W0 at init. The bias is not rescaled. With dropout only the adapter's
share of the product sees the dropped input x~ (PEFT's rule):

  h = x W0 + (m/c - 1) x~ W0 + (m/c) s x~ A B

Trainable parameters: r (i + o) + o a matrix.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from lora_jax import errors
from lora_jax import quant
from lora_jax import struct
from lora_jax import types
from lora_jax.adapters import base
from lora_jax.adapters import lora
from lora_jax.adapters import starts


@struct.dataclass
class DoRA(lora.LoRA):
  """LoRA's fields, and:

    m: `[o]`, the magnitude of each output column.
    c: `[o]`, the norms, where they are known beforehand (`prepared`).
  """

  m: types.Array = base.trained("out", default=None)
  c: types.Array | None = base.frozen("out", default=None)

  peft_type: ClassVar[str | None] = "LORA"

  def norms(self, weight) -> jax.Array:
    """c, `[o]` float32."""
    v = quant.dequantize(jax.lax.stop_gradient(weight), jnp.float32)
    return jnp.linalg.norm(v + jax.lax.stop_gradient(self.delta()), axis=0)

  def prepared(self, weight):
    if self.c is not None:  # Prepared before; its A and B may be rounded.
      return self
    return dataclasses.replace(self, c=self.norms(weight))

  def gain(self, weight) -> jax.Array:
    """m / c, `[o]` float32; exactly 1 where the layer is not adapted."""
    c = self.norms(weight) if self.c is None else self.c
    # A column of zeros has no direction; it stays zero whatever m is.
    return jnp.where((self.rank > 0) & (c > 0),
                     self.m / jnp.where(c > 0, c, 1.0), 1.0)

  def apply(self, x, weight, noise=None):
    gain = self.gain(weight).astype(x.dtype)
    y = quant.matmul(x, weight)
    if noise is None:
      return gain * (y + self.down_up(x))
    dropped = noise.dropout(x, self.rate)
    inner = quant.matmul(dropped, weight)
    return y + (gain - 1) * inner + gain * self.down_up(dropped)

  def finish(self, y, weight):
    return self.gain(weight).astype(y.dtype) * y

  def lookup(self, tokens, table):
    gain = self.gain(table)
    return gain * super().lookup(tokens, table)

  def merge(self, weight):
    return self.gain(weight) * super().merge(weight)

  def size(self) -> int:
    adapted = int((self.rank > 0).sum())
    return super().size() + adapted * self.m.shape[-1]

  def to_peft(self, embedding=False):
    return super().to_peft(embedding) | {"lora_magnitude_vector": self.m}

  def difference(self):
    raise errors.UserError(
        "DoRA's gain m/||V|| multiplies the whole weight, so that its change "
        "is no difference of low ranks; export with --format=hf, or as it is "
        "(the adapter folder of the run, which PEFT reads beside an "
        "unquantised base)")

  @classmethod
  def from_peft(cls, tensors, width, frozen):
    plain = lora.LoRA.from_peft(tensors, width, frozen)
    m = jnp.asarray(tensors["lora_magnitude_vector"], jnp.float32)
    return cls(a=plain.a, b=plain.b, m=m, **frozen)


def init(key, weight, width, frozen, embedding=False, draw=starts.kaiming,
         given=None):
  """The adapter of one module; see `lora.init`."""
  plain = lora.init(key, weight, width, frozen, embedding, draw, given)
  # A drawn start has no delta, and m is the norm of W0 alone.
  v = quant.dequantize(weight, jnp.float32) + plain.delta()
  return DoRA(
      a=plain.a, b=plain.b, a0=plain.a0, b0=plain.b0,
      m=jnp.linalg.norm(v, axis=0), **frozen)
