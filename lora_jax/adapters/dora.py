"""DoRA: weight-decomposed low-rank adaptation (Liu et al. 2024, 2402.09353).

  V = W0 + s A B,   c = ||V|| per output column,   W' = (m / c) V    (eq. 5)

with c treated as a constant by the gradient (section 4.3), recomputed every
step, and m `[o]` initialised to ||W0|| of the *dequantised* weight, so that
W' = W0 at init. The bias is not rescaled. With dropout only the adapter's
share of the product sees the dropped input x~ (PEFT's rule):

  h = x W0 + (m/c - 1) x~ W0 + (m/c) s x~ A B

The norms need no second W. Of each column, with B' = s B,

  c^2 = ||W0||^2 + sum_r B' (2 A^T W0 + A^T A B')

whose first term is a constant of the base and whose A^T W0 `[r, o]` is a small
product with the weight that the forward pass has dequantised anyway. There the
operands have its type, the sums float32. If A and W0 are rounded by relative
errors of at most u (2^-9 in bfloat16), independent of one another, c is off by
about rho u sqrt(2 / (3 i)), rho = ||s A B|| / ||W0||: 7e-6 for a delta of 30%
of a column of 4096. Where V cancels, c^2 is the difference of larger numbers
and no more than their rounding; it is not taken to be below `FLOOR` of
||W0||^2.

Trainable parameters: r (i + o) + o a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lora_jax import keep as keep_lib
from lora_jax import quant
from lora_jax import struct
from lora_jax import types
from lora_jax.adapters import base
from lora_jax.adapters import lora
from lora_jax.adapters import method

# Of ||W0||^2, the least that c^2 is taken for: about what its terms leave of
# one another's rounding in bfloat16. The gain stays below m / ||W0|| times 256.
FLOOR = 2.0**-16


def squares(weight: types.Tree, shared: types.Tree = None) -> jax.Array:
  """||W||^2 of the columns of a weight `[i, o]`, `[o]` float32."""
  del shared
  return jnp.sum(jnp.square(quant.dequantize(weight, jnp.float32)), axis=0)


@struct.dataclass
class DoRA(lora.LoRA):
  """LoRA's fields, and:

    m: `[o]`, the magnitude of each output column.
    square: `[o]`, ||W0||^2 (`base.beside`); without it, norms are taken of the
      weight itself.
    c: `[o]`, the norms, where they are known beforehand (`prepared`).
  """

  m: types.Array = base.trained("out", default=None)
  square: types.Array | None = base.frozen("out", default=None)
  c: types.Array | None = base.frozen("out", default=None)

  constants: ClassVar[Mapping[str, Callable]] = {"square": squares}
  finishes: ClassVar[bool] = True

  @property
  def reads_cross(self) -> bool:
    return self.c is None and self.square is not None

  def norms(
      self, weight: types.Tree, dtype: Any = jnp.float32,
      cross: types.Array | None = None, keep: keep_lib.Keep = keep_lib.named,
  ) -> jax.Array:
    """c, `[o]` float32, without a gradient.

    Args:
      weight: `[i, o]`.
      dtype: to which A and W0 are rounded for A^T W0.
      cross: A^T W0 `[r, o]`, if somebody has it.
      keep: is given c.
    """
    if self.c is not None:
      return self.c
    if self.square is None:
      return self.direct_norms(weight)
    a, b = jax.lax.stop_gradient(self.factors())
    if cross is None:
      cross = quant.cross(a, weight, dtype)
    gram = jnp.matmul(a.T, a, precision="highest")
    change = b * (2 * cross + jnp.matmul(gram, b, precision="highest"))
    total = self.square + jnp.sum(change, axis=0)
    return keep(base.NORMS, _root(total, self.square))

  def direct_norms(self, weight: types.Tree) -> jax.Array:
    """`norms` of W0 + s A B as it stands: a float32 weight's worth of memory,
    and no cancellation."""
    weight, delta = jax.lax.stop_gradient((weight, self.delta()))
    v = quant.dequantize(weight, jnp.float32) + delta
    return _root(jnp.sum(jnp.square(v), axis=0), squares(weight))

  def prepared(self, weight, shared=None):
    if self.c is not None:  # Prepared before; its A and B may be rounded.
      return self
    return dataclasses.replace(self, c=self.direct_norms(weight))

  def gain(self, c: types.Array) -> jax.Array:
    """m / c, `[o]` float32; exactly 1 where the layer is not adapted."""
    # A column of zeros has no direction; it stays zero whatever m is.
    return jnp.where((self.rank > 0) & (c > 0),
                     self.m / jnp.where(c > 0, c, 1.0), 1.0)

  def apply(self, x, weight, noise=None):
    y = quant.matmul(x, weight)
    if noise is None:
      return self.finish(y + self.down_up(x), weight)
    dropped = noise.dropout(x, self.rate)
    inner = quant.matmul(dropped, weight)
    return self._scaled(
        inner + self.down_up(dropped), self.norms(weight, x.dtype),
        y.astype(jnp.float32) - inner.astype(jnp.float32))

  def finish(self, y, weight, cross=None, keep=keep_lib.named):
    return self._scaled(y, self.norms(weight, y.dtype, cross, keep))

  def _scaled(self, y, c, beside=None):
    """m / c times y, and what stands beside it, in y's dtype."""
    # In float32, in which the gradient of m is summed over tokens.
    wide = self.gain(c) * y.astype(jnp.float32)
    return (wide if beside is None else beside + wide).astype(y.dtype)

  def lookup(self, tokens, table):
    gain = self.gain(self.norms(table, table.dtype))
    return gain * super().lookup(tokens, table)

  def merge(self, weight):
    c = self.direct_norms(weight) if self.c is None else self.c
    return self.gain(c) * super().merge(weight)

  def size(self) -> int:
    adapted = int((self.rank > 0).sum())
    return super().size() + adapted * self.m.shape[-1]

  def to_peft(self, embedding=False):
    return super().to_peft(embedding) | {"lora_magnitude_vector": self.m}

  def inert(self):
    return dataclasses.replace(super().inert(), m=jnp.ones_like(self.m))

  @classmethod
  def from_peft(cls, tensors, slot):
    plain = lora.LoRA.from_peft(tensors, slot)
    m = jnp.asarray(tensors["lora_magnitude_vector"], jnp.float32)
    return cls(a=plain.a, b=plain.b, m=m, **slot.values())


def _root(total, square):
  return jnp.sqrt(jnp.maximum(total, FLOOR * square))


def init(key, weight, slot, shared=None):
  """The adapter of one module; see `lora.init`."""
  plain = lora.init(key, weight, slot, shared)
  # A drawn start has no delta, and m is the norm of W0 alone.
  v = quant.dequantize(weight, jnp.float32) + plain.delta()
  return DoRA(
      a=plain.a, b=plain.b, a0=plain.a0, b0=plain.b0,
      m=jnp.linalg.norm(v, axis=0), **slot.values())


METHOD = method.Method(
    summary="h = m/||W0 + sAB|| x (W0 + sAB)", paper="arXiv 2402.09353",
    adapter=DoRA, init=init, count="r * (i + o) + o", embeddings=True,
    patterns=True, starts=None, zero_gradients=("a",),
    form=lora.form(use_dora=True))
