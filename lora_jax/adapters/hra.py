"""HRA: a chain of Householder reflections (Yuan et al. 2024, 2405.17484).

  h = (x H_r ... H_1) W0,  H_j = I - 2 u_j u_j' / ||u_j||^2

with u_j `[i]` in equal pairs at init, so that the reflections cancel and
h = x W0. The chain is one product of rank r: with unit u_j in the columns of U,

  H_1 ... H_r = I - U T U',   T = (I/2 + striu(U' U))^-1

(the compact WY form), so that x is passed over once and not r times.

With `gram_schmidt` the u_j are made orthonormal in turn, and T = 2 I. No such
chain is the identity, nor is one of an odd r: both start, as in PEFT, at random
reflections. (PEFT starts those of an even r as pairs in this case, too, and
divides what rounding left of the second of each by its norm.)

Trainable parameters: r i a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import quant
from lora_jax import struct
from lora_jax import types
from lora_jax.adapters import base
from lora_jax.adapters import config as config_lib
from lora_jax.adapters import method
from lora_jax.adapters import pieces


@dataclasses.dataclass(frozen=True)
class Options:
  """Attributes:

    gram_schmidt: whether the u_j are made orthonormal.
  """

  gram_schmidt: bool = False


@struct.dataclass
class HRA(base.Adapter):
  """Attributes:

    u: `[i, r]`.
    rank: `[]` int32, 0: not adapted.
    gram_schmidt: see `Options`.
  """

  u: types.Array = base.trained("in", None)
  rank: types.Array = base.frozen()
  gram_schmidt: bool = base.static(default=False)

  def _parts(self) -> tuple[jax.Array, jax.Array]:
    """U `[i, r]` and T' `[r, r]`; T' = 0 where the layer is not adapted."""
    r = self.u.shape[1]
    if self.gram_schmidt:  # But for signs, which do not matter.
      return jnp.linalg.qr(self.u)[0], self.active(2 * jnp.eye(r), 0.0)
    unit = self.u / jnp.linalg.norm(self.u, axis=0)
    gram = jnp.matmul(unit.T, unit, precision="highest")
    t = jax.scipy.linalg.solve_triangular(
        0.5 * jnp.eye(r) + jnp.triu(gram, 1), jnp.eye(r))
    return unit, self.active(t.T, 0.0)

  def apply(self, x, weight, noise=None):
    del noise
    unit, t = (part.astype(x.dtype) for part in self._parts())
    return quant.matmul(x - ((x @ unit) @ t) @ unit.T, weight)

  def merge(self, weight):
    w, (unit, t) = quant.dequantize(weight, jnp.float32), self._parts()
    with jax.default_matmul_precision("highest"):
      return w - unit @ (t @ (unit.T @ w))

  def to_peft(self, embedding=False):
    return {"hra_u": self.u}

  @classmethod
  def from_peft(cls, tensors, slot):
    return cls(u=jnp.asarray(tensors["hra_u"], jnp.float32), rank=slot.rank,
               gram_schmidt=slot.options.gram_schmidt)

  @classmethod
  def peft_rank(cls, tensors):
    return tensors["hra_u"].shape[1]


def init(key, weight, slot, shared=None):
  """The adapter of one module before the first step."""
  del shared
  gram_schmidt = slot.options.gram_schmidt
  same = 1 if gram_schmidt or slot.width % 2 else 2
  drawn = slot.width // same
  u = pieces.uniform(key, (weight.shape[-2], drawn), drawn)
  return HRA(u=jnp.repeat(u, same, axis=1), rank=slot.rank,
             gram_schmidt=gram_schmidt)


def _config(config: config_lib.AdapterConfig) -> dict[str, Any]:
  return {"r": config.rank, "apply_GS": config.options.gram_schmidt,
          "bias": "none", "init_weights": True}


def _block(config: Mapping[str, Any]) -> dict[str, Any]:
  return {"rank": int(config["r"]), "options": {
      "gram_schmidt": bool(config.get("apply_GS"))}}


METHOD = method.Method(
    summary="h = (x H_r ... H_1) W0, H_j reflections", paper="arXiv 2405.17484",
    adapter=HRA, init=init, count="r * i", options=Options,
    form=method.Form(
        peft_type="HRA", config=_config, block=_block,
        neutral={"bias": ("none",)}))
