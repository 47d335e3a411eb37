"""GraLoRA: granular low-rank adaptation (Jung et al. 2025, arXiv 2505.20355).

  h = x W0 + s (x~ C + x~ A' B')        s = alpha / (r + r'),  x~ = dropout(x)

with C `[i, o]` cut into k x k blocks, C_nj = A_n[:, j] B_j[n] of rank r / k:
A_n `[i/k, r]` and B_j `[r, o/k]` are cut into k parts of r / k columns and
rows, part j of A_n meeting part n of B_j. C has LoRA's parameters and up to k
times its rank. Hybrid GraLoRA has r' > 0 ranks of LoRA beside it (A' `[i,
r']`, B' `[r', o]`). A ~ U(+-sqrt(k/i)), A' ~ U(+-1/sqrt(i)), B = B' = 0 at
init, so that h = x W0.

Trainable parameters: (r + r') (i + o) a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import errors
from lora_jax import struct
from lora_jax import types
from lora_jax.adapters import additive
from lora_jax.adapters import base
from lora_jax.adapters import config as config_lib
from lora_jax.adapters import method
from lora_jax.adapters import pieces


@dataclasses.dataclass(frozen=True)
class Options:
  """Attributes:

    gralora_k: k, which divides r, i and o.
    hybrid_r: r'.
  """

  gralora_k: int = 2
  hybrid_r: int = 0

  def validate(self) -> None:
    """Raises a `UsageError` if a value is out of range."""
    if self.gralora_k < 1:
      raise errors.UsageError(
          f"adapter.options.gralora_k={self.gralora_k} is out of range; use a "
          "positive number that divides adapter.rank")
    if self.hybrid_r < 0:
      raise errors.UsageError(
          f"adapter.options.hybrid_r={self.hybrid_r} is out of range; use 0 "
          "or more")


@struct.dataclass
class GraLoRA(additive.Additive):
  """Attributes (a leading `l` axis when stacked):

    a: `[k, i/k, r]`.
    b: `[k, r, o/k]`.
    scale: `[]`, s.
    rate: `[]`, dropout rate.
    rank: `[]` int32, 0: not adapted.
    a_general, b_general: `[i, r']` and `[r', o]`, or None.
  """

  a: types.Array = base.trained()
  b: types.Array = base.up()
  scale: types.Array = base.frozen()
  rate: types.Array = base.frozen()
  rank: types.Array = base.frozen()
  a_general: types.Array = base.trained("in", None, default=None)
  b_general: types.Array = base.up(None, "out", default=None)

  def down_up(self, x):
    k, _, r = self.a.shape
    a, b = self.a.astype(x.dtype), self.b.astype(x.dtype)
    low = jnp.einsum("...ni,nir->...nr", x.reshape(*x.shape[:-1], k, -1), a)
    # Part j of every A_n goes to B_j.
    low = low.reshape(*low.shape[:-1], k, r // k).swapaxes(-3, -2)
    y = jnp.einsum("...jr,jro->...jo", low.reshape(*low.shape[:-2], r), b)
    y = y.reshape(*x.shape[:-1], -1)
    if self.a_general is not None:
      y += (x @ self.a_general.astype(x.dtype)) @ self.b_general.astype(x.dtype)
    return y * self.active(self.scale, 0.0).astype(x.dtype)

  def factors(self):
    """C as a product of k r columns, and the LoRA beside it."""
    k, _, r = self.a.shape
    a = jax.scipy.linalg.block_diag(*self.a)
    # Rows are (n, j, r/k): those of A_n's part j, which meet B_j alone.
    b = self.b.reshape(k, k, r // k, -1)
    b = jnp.einsum("jnso,jm->njsmo", b, jnp.eye(k)).reshape(k * r, -1)
    if self.a_general is not None:
      a = jnp.concatenate([a, self.a_general], 1)
      b = jnp.concatenate([b, self.b_general], 0)
    return a, self.active(self.scale, 0.0) * b

  def to_peft(self, embedding=False):
    found = {"gralora_A": self.a, "gralora_B": self.b}
    if self.a_general is not None:
      found |= {"gralora_A_general.weight": self.a_general.T,
                "gralora_B_general.weight": self.b_general.T}
    return found

  @classmethod
  def from_peft(cls, tensors, slot):
    found = {name: jnp.asarray(tensors[f"gralora_{name.upper()}"], jnp.float32)
             for name in ("a", "b")}
    if "gralora_A_general.weight" in tensors:
      found |= {
          f"{name}_general": jnp.asarray(
              tensors[f"gralora_{name.upper()}_general.weight"],
              jnp.float32).T for name in ("a", "b")}
    return cls(**found, **slot.values())

  @classmethod
  def peft_rank(cls, tensors):
    return tensors["gralora_A"].shape[2]


def init(key, weight, slot, shared=None):
  """The adapter of one module before the first step.

  Raises:
    errors.UsageError: if k does not divide r, i and o.
  """
  del shared
  (i, o), r = weight.shape[-2:], slot.width
  k, extra = slot.options.gralora_k, slot.options.hybrid_r
  if r % k or i % k or o % k:
    raise errors.UsageError(
        f"adapter.options.gralora_k={k} does not divide adapter.rank={r} and "
        f'{i} x {o} of "{slot.target}"; use a common divisor, or leave '
        f'"{slot.target}" out of adapter.targets')
  first, second = jax.random.split(key)
  general = {} if not extra else {
      "a_general": pieces.uniform(second, (i, extra), i),
      "b_general": jnp.zeros((extra, o), jnp.float32)}
  return GraLoRA(
      a=pieces.uniform(first, (k, i // k, r), i // k),
      b=jnp.zeros((k, r, o // k), jnp.float32), **general, **slot.values())


def _config(config: config_lib.AdapterConfig) -> dict[str, Any]:
  alpha = float(config.alpha)
  return {
      "r": config.rank, "hybrid_r": config.options.hybrid_r,
      "alpha": int(alpha) if alpha.is_integer() else alpha,
      "gralora_dropout": float(config.dropout),
      "gralora_k": config.options.gralora_k, "fan_in_fan_out": False,
      "bias": "none", "init_weights": True}


def _block(config: Mapping[str, Any]) -> dict[str, Any]:
  return {"rank": int(config["r"]), "alpha": config.get("alpha", 64),
          "dropout": float(config.get("gralora_dropout") or 0.0),
          "options": {"gralora_k": config.get("gralora_k", 2),
                      "hybrid_r": config.get("hybrid_r", 0)}}


METHOD = method.Method(
    summary="h = x W0 + s x C, C of k x k blocks A_nj B_jn",
    paper="arXiv 2505.20355", adapter=GraLoRA, init=init,
    count="(r + hybrid_r) * (i + o)", options=Options,
    scale=lambda alpha, r, options: alpha / (r + options.hybrid_r),
    zero_gradients=("a", "a_general"),
    # The vocabulary of the tests is odd.
    tiny={"targets": "q_proj,up_proj,down_proj", "options": {"hybrid_r": 2}},
    form=method.Form(
        peft_type="GRALORA", config=_config, block=_block,
        neutral={"bias": ("none",), "fan_in_fan_out": (False,)}))
