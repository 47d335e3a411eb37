"""PSOFT: orthogonal fine-tuning of a principal subspace (ICLR 2026,
openreview FSHrinMArK).

  h = x W0 + dropout(x) A (R' - I) B,   R = diag(b) (I + Q) (I - Q)^-1 diag(a)

with A `[i, r]`, B `[r, o]` frozen: A B is W0's SVD of rank r, all singular
values in B, or half of each with `symmetric`. Trained are the upper triangle of
the skew-symmetric Q `[r, r]` = 0 at init and a, b `[r]` = 1, so that R = I and
h = x W0. With `neumann` the Cayley transform is OFT's series; without `orth`, R
is any matrix. The paper's alpha cancels.

The folder holds A and B. Hugging Face PEFT's PSOFT files do not, but have them
computed from the base again: since the signs of singular vectors are anyone's
choice (CPU libraries differ from one another), such a file does not determine
the model, and is not read here.

Trainable parameters: r (r - 1) / 2 + 2 r a matrix.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from lora_jax import errors
from lora_jax import quant
from lora_jax import struct
from lora_jax import types
from lora_jax.adapters import additive
from lora_jax.adapters import base
from lora_jax.adapters import method
from lora_jax.adapters import oft
from lora_jax.adapters.starts import decomposed

# In the folder.
NAMES = ("q", "vector_a", "vector_b", "a", "b")


@dataclasses.dataclass(frozen=True)
class Options:
  """Attributes:

    orth: whether R is orthogonal but for a and b.
    mag_a, mag_b: whether there are a and b.
    symmetric: whether A has half of the singular values.
    neumann: whether R is OFT's series.
    terms: of the series.
    eps: bound of the norm of Q, of the series; 0: none.
    niter: power iterations of a randomised SVD; 0: the exact one.
  """

  orth: bool = True
  mag_a: bool = True
  mag_b: bool = True
  symmetric: bool = False
  neumann: bool = False
  terms: int = 5
  eps: float = 0.0
  niter: int = 0

  def validate(self) -> None:
    """Raises a `UsageError` if a value is out of range."""
    for name, least in {"terms": 2, "eps": 0, "niter": 0}.items():
      if getattr(self, name) < least:
        raise errors.UsageError(
            f"adapter.options.{name}={getattr(self, name)} is out of range; "
            f"use {least} or more")

  def parameters(self, r: int) -> int:
    """Trained, of one matrix."""
    size = r * (r - 1) // 2 if self.orth else r * r
    return size + r * (self.mag_a + self.mag_b)


@struct.dataclass
class PSOFT(additive.Additive):
  """Attributes:

    q: `[r (r - 1) / 2]`, the upper triangle row by row; `[r, r]`, R, without
      `orth`.
    vector_a, vector_b: `[r]`, or None.
    a: `[i, r]`.
    b: `[r, o]`.
    rate: `[]`, dropout rate.
    rank: `[]` int32, 0: not adapted.
    options: static, the method's.
  """

  q: types.Array = base.trained()
  a: types.Array = base.frozen("in", None)
  b: types.Array = base.frozen(None, "out")
  rate: types.Array = base.frozen()
  rank: types.Array = base.frozen()
  vector_a: types.Array | None = base.trained(None, default=None)
  vector_b: types.Array | None = base.trained(None, default=None)
  options: Options = base.static(default=Options())

  def rotation(self) -> jax.Array:
    """R, `[r, r]` float32."""
    r = self.q
    if self.options.orth:
      q = self.q[None]
      if not self.options.neumann:
        r = oft.cayley(-oft.skew_symmetric(q, self.a.shape[-1]))[0]
      else:
        if self.options.eps:
          q = oft.shortened(q, self.options.eps)
        r = oft.neumann(oft.skew_symmetric(q, self.a.shape[-1]),
                        self.options.terms)[0]
    if self.vector_b is not None:
      r = self.vector_b[:, None] * r
    return r if self.vector_a is None else r * self.vector_a

  def factors(self):
    change = self.rotation().T - jnp.eye(self.a.shape[-1])
    return self.a, jnp.matmul(
        self.active(change, 0.0), self.b, precision="highest")

  def to_peft(self, embedding=False):
    # With what is not trained; see above.
    return {name: getattr(self, name) for name in NAMES
            if getattr(self, name) is not None}

  @classmethod
  def from_peft(cls, tensors, slot):
    return cls(options=slot.options, **slot.values("rate", "rank"), **{
        name: jnp.asarray(tensors[name], jnp.float32) for name in NAMES
        if name in tensors})

  @classmethod
  def peft_rank(cls, tensors):
    return tensors["a"].shape[1]


def init(key, weight, slot, shared=None):
  """The adapter of one module before the first step.

  Raises:
    errors.UsageError: if the weight has fewer directions than the rank.
  """
  del key, shared
  r, o = slot.width, slot.options
  w = quant.dequantize(weight, jnp.float32)
  if r > min(w.shape):
    raise errors.UsageError(
        f"adapter.rank={r} is above the {min(w.shape)} directions of "
        f"{slot.target}; use a smaller rank")
  u, s, v = (decomposed.randomised_svd(w, r, o.niter) if o.niter
             else jnp.linalg.svd(w, full_matrices=False))
  u, s, v = u[:, :r], s[:r], v[:r]
  # A run that goes on elsewhere has the same: each column's largest entry
  # is positive.
  largest = jnp.argmax(jnp.abs(u), axis=0, keepdims=True)
  sign = jnp.sign(jnp.take_along_axis(u, largest, axis=0))
  u, v = u * sign, v * sign.T
  left = jnp.sqrt(s) if o.symmetric else jnp.ones_like(s)
  ones = jnp.ones(r, jnp.float32)
  return PSOFT(
      q=jnp.zeros(r * (r - 1) // 2, jnp.float32) if o.orth else jnp.eye(r),
      vector_a=ones if o.mag_a else None, vector_b=ones if o.mag_b else None,
      a=u * left, b=(s / left)[:, None] * v, options=o,
      **slot.values("rate", "rank"))


METHOD = method.Method(
    summary="h = x W0 + x A (R' - I) B, A B of W0's SVD, R a rotation, scaled",
    paper="openreview FSHrinMArK", adapter=PSOFT, init=init,
    count="options.parameters(r)", options=Options)
