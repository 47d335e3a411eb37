"""PSOFT: orthogonal fine-tuning of a principal subspace (ICLR 2026,
openreview FSHrinMArK).

  h = x W0 + s dropout(x) A (R' - I) B,  R = diag(b) (I + Q) (I - Q)^-1 diag(a)

with A `[i, r]`, B `[r, o]` frozen and s = alpha / r: s A B is W0's SVD of rank
r, all singular values in B, or half of each with `symmetric`. Trained are the
upper triangle of the skew-symmetric Q `[r, r]` = 0 at init and a, b `[r]` = 1,
so that R = I and h = x W0. With `neumann` the Cayley transform is OFT's series;
without `orth`, R is any matrix.

The folder holds A and B, as `psoft_A` and `psoft_B` beside PEFT's tensors.
Hugging Face PEFT saves neither, and computes them from the base again: since
the signs of singular vectors are anyone's choice (CPU libraries differ from one
another), its own file does not determine the model. docs/FORMATS.md says how
they are added to it, and how PEFT is given ours.

Trainable parameters: r (r - 1) / 2 + 2 r a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import errors
from lora_jax import quant
from lora_jax import struct
from lora_jax import types
from lora_jax.adapters import additive
from lora_jax.adapters import base
from lora_jax.adapters import config as config_lib
from lora_jax.adapters import method
from lora_jax.adapters import oft
from lora_jax.adapters.starts import decomposed

# In the folder.
NAMES = {"q": "psoft_R.weight", "vector_a": "psoft_R.vector_a",
         "vector_b": "psoft_R.vector_b"}
FACTORS = {"a": "psoft_A", "b": "psoft_B"}  # Transposed there.


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
    scale: `[]`, s.
    rank: `[]` int32, 0: not adapted.
    options: static, the method's.
  """

  q: types.Array = base.trained()
  a: types.Array = base.frozen("in", None)
  b: types.Array = base.frozen(None, "out")
  rate: types.Array = base.frozen()
  scale: types.Array = base.frozen()
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
    return self.a, self.scale * jnp.matmul(
        self.active(change, 0.0), self.b, precision="highest")

  def to_peft(self, embedding=False):
    found = {theirs: getattr(self, ours) for ours, theirs in NAMES.items()
             if getattr(self, ours) is not None}
    # What is not trained, too; see above.
    return found | {theirs: getattr(self, ours).T
                    for ours, theirs in FACTORS.items()}

  @classmethod
  def from_peft(cls, tensors, slot):
    found = {ours: jnp.asarray(tensors[theirs], jnp.float32)
             for ours, theirs in NAMES.items() if theirs in tensors}
    return cls(
        options=slot.options, **slot.values("rate", "scale", "rank"), **found,
        **{ours: jnp.asarray(_factor(tensors, theirs), jnp.float32).T
           for ours, theirs in FACTORS.items()})

  @classmethod
  def peft_rank(cls, tensors):
    return _factor(tensors, "psoft_A").shape[0]


def _factor(tensors, name):
  if name not in tensors:
    raise errors.UserError(
        f"the PSOFT file has no {name}: PEFT does not save it, and the SVD "
        "that it comes from has other signs elsewhere; add psoft_A and psoft_B "
        "to the file as docs/FORMATS.md says")
  return tensors[name]


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
  s = s / jnp.where(slot.scale == 0, 1.0, slot.scale)
  left = jnp.sqrt(s) if o.symmetric else jnp.ones_like(s)
  ones = jnp.ones(r, jnp.float32)
  return PSOFT(
      q=jnp.zeros(r * (r - 1) // 2, jnp.float32) if o.orth else jnp.eye(r),
      vector_a=ones if o.mag_a else None, vector_b=ones if o.mag_b else None,
      a=u * left, b=(s / left)[:, None] * v, options=o,
      **slot.values("rate", "scale", "rank"))


def _config(config: config_lib.AdapterConfig) -> dict[str, Any]:
  alpha, o = float(config.alpha), config.options
  return {
      "r": config.rank,
      "psoft_alpha": int(alpha) if alpha.is_integer() else alpha,
      "psoft_dropout": float(config.dropout),
      "ab_svd_init": "pissa_init" if o.symmetric else "psoft_init",
      "psoft_svd": "lowrank" if o.niter else "full",
      "psoft_svd_lowrank_niter": o.niter or 10, "random_seed": 0,
      "psoft_orth": o.orth, "psoft_mag_b": o.mag_b, "psoft_mag_a": o.mag_a,
      "use_cayley_neumann": o.neumann, "num_cayley_neumann_terms": o.terms,
      "cayley_neumann_eps": o.eps or None, "fan_in_fan_out": False,
      "init_weights": True}


def _block(config: Mapping[str, Any]) -> dict[str, Any]:
  names = {"orth": "psoft_orth", "mag_a": "psoft_mag_a", "mag_b": "psoft_mag_b",
           "neumann": "use_cayley_neumann",
           "terms": "num_cayley_neumann_terms"}
  options = {ours: config[theirs] for ours, theirs in names.items()
             if theirs in config}
  lowrank = config.get("psoft_svd", "full") == "lowrank"
  return {
      "rank": int(config["r"]), "alpha": config.get("psoft_alpha", 32),
      "dropout": float(config.get("psoft_dropout") or 0.0),
      "options": options | {
          "symmetric": config.get("ab_svd_init") == "pissa_init",
          "eps": float(config.get("cayley_neumann_eps") or 0.0),
          "niter": config.get("psoft_svd_lowrank_niter", 10) if lowrank else 0}}


METHOD = method.Method(
    summary="h = x W0 + (alpha/r) x A (R' - I) B, (alpha/r) A B of W0's SVD",
    paper="openreview FSHrinMArK", adapter=PSOFT, init=init,
    count="options.parameters(r)", options=Options,
    form=method.Form(
        peft_type="PSOFT", config=_config, block=_block,
        neutral={"fan_in_fan_out": (False,)}))
