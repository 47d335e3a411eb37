"""Super-Tuning: the largest entries of a weight are trained (arXiv 2607.09287).

  h = x (W0 + S)                          Super
  h = x (W0 + S) + s dropout(x) A B       Supra, with `r`; s = alpha / r

S `[i, o]` has i o (1 - sparsity) entries that are not zero, at the places where
|W0| is largest, or smallest without `select_top`. They are kept in the file,
and start at 0; A and B as LoRA's.

Trainable parameters: i o (1 - sparsity) a matrix, and r (i + o) of Supra.
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
from lora_jax.adapters import base
from lora_jax.adapters import config as config_lib
from lora_jax.adapters import method
from lora_jax.adapters import pieces


@dataclasses.dataclass(frozen=True)
class Options:
  """Attributes:

    sparsity: the share of entries that are not trained.
    select_top: whether the largest are trained, or the smallest.
    r: of Supra's A and B; 0: none.
  """

  sparsity: float = 0.99
  select_top: bool = True
  r: int = 0

  def validate(self) -> None:
    """Raises a `UsageError` if a value is out of range."""
    if not 0 <= self.sparsity < 1:
      raise errors.UsageError(
          f"adapter.options.sparsity={self.sparsity} is out of range; use a "
          "share in [0, 1)")
    if self.r < 0:
      raise errors.UsageError(
          f"adapter.options.r={self.r} is out of range; use 0 for no low-rank "
          "part, or more")

  def entries(self, i: int, o: int) -> int:
    """Of S that are trained."""
    return int(i * o * (1 - self.sparsity))


@struct.dataclass
class Super(base.Adapter):
  """Attributes:

    values: `[n]`.
    index: `[n]` int32, their places in a flat `[o, i]`.
    rank: `[]` int32, 0: not adapted.
    shape: static, (i, o).
  """

  values: types.Array = base.up(None)
  index: types.Array = base.frozen(None)
  rank: types.Array = base.frozen()
  shape: tuple[int, int] = base.static(default=(0, 0))

  def sparse(self) -> jax.Array:
    """S, `[i, o]` float32."""
    i, o = self.shape
    values = self.active(self.values, 0.0)
    return jnp.zeros(i * o).at[self.index].add(values).reshape(o, i).T

  def apply(self, x, weight, noise=None):
    del noise
    return quant.matmul(x, weight) + pieces.dense(x, Super.sparse, self)

  def merge(self, weight):
    return quant.dequantize(weight, jnp.float32) + self.sparse()

  def to_peft(self, embedding=False):
    return {"supertuning_values": self.values,
            "supertuning_indices": self.index}

  @classmethod
  def from_peft(cls, tensors, slot):
    return cls(
        values=jnp.asarray(tensors["supertuning_values"], jnp.float32),
        index=jnp.asarray(tensors["supertuning_indices"], jnp.int32),
        rank=slot.rank, shape=slot.shape)


@struct.dataclass
class Supra(Super):
  """Super's, and attributes:

    a: `[i, r]`.
    b: `[r, o]`.
    scale: `[]`, s.
    rate: `[]`, of dropout of what A reads.
  """

  a: types.Array = base.trained("in", None, default=None)
  b: types.Array = base.up(None, "out", default=None)
  scale: types.Array = base.frozen(default=None)
  rate: types.Array = base.frozen(default=None)

  def apply(self, x, weight, noise=None):
    y = super().apply(x, weight)
    if noise is not None:
      x = noise.dropout(x, self.rate)
    h = (x @ self.a.astype(x.dtype)) * self.active(
        self.scale, 0.0).astype(x.dtype)
    return y + h @ self.b.astype(x.dtype)

  def merge(self, weight):
    return super().merge(weight) + self.active(self.scale, 0.0) * jnp.matmul(
        self.a, self.b, precision="highest")

  def to_peft(self, embedding=False):
    return super().to_peft() | {"supertuning_lora_A.weight": self.a.T,
                                "supertuning_lora_B.weight": self.b.T}

  @classmethod
  def from_peft(cls, tensors, slot):
    plain = Super.from_peft(tensors, slot)
    a, b = (jnp.asarray(tensors[f"supertuning_lora_{x}.weight"], jnp.float32).T
            for x in "AB")
    return cls(values=plain.values, index=plain.index, shape=slot.shape,
               a=a, b=b, **slot.values())


def kind(slot: base.Slot) -> type[Super]:
  """Super's or Supra's."""
  return Supra if slot.options.r else Super


def init(key, weight, slot, shared=None):
  """The adapter of one module before the first step.

  Raises:
    errors.UsageError: if no entry is left to train.
  """
  del shared
  i, o = weight.shape[-2:]
  n = slot.options.entries(i, o)
  if n < 1:
    raise errors.UsageError(
        f"adapter.options.sparsity={slot.options.sparsity} leaves none of the "
        f"{i * o} entries of {slot.target}; lower it")
  size = jnp.abs(quant.dequantize(weight, jnp.float32)).T.reshape(-1)
  _, index = jax.lax.top_k(size if slot.options.select_top else -size, n)
  found: dict[str, Any] = dict(
      values=jnp.zeros(n, jnp.float32), index=index, rank=slot.rank,
      shape=(i, o))
  r = slot.options.r
  if not r:
    return Super(**found)
  return Supra(
      a=pieces.uniform(key, (i, r), i), b=jnp.zeros((r, o), jnp.float32),
      **found, **slot.values("scale", "rate"))


def _config(config: config_lib.AdapterConfig) -> dict[str, Any]:
  o, alpha = config.options, float(config.alpha)
  return {"sparsity": o.sparsity, "select_top": o.select_top,
          "r": o.r or None, "lora_alpha": alpha if o.r else None,
          "lora_dropout": float(config.dropout) if o.r else 0.0,
          "save_precomputed_indices": True, "init_weights": True}


def _block(config: Mapping[str, Any]) -> dict[str, Any]:
  r = config.get("r") or 0
  found: dict[str, Any] = {
      "options": method.named(Options, dict(config) | {"r": r})}
  if r:
    found |= {"alpha": config.get("lora_alpha") or 2 * r,
              "dropout": float(config.get("lora_dropout") or 0.0)}
  return found


METHOD = method.Method(
    summary="h = x (W0 + S), S where |W0| is largest",
    paper="arXiv 2607.09287", adapter=Super, init=init, kind=kind,
    count="options.entries(i, o) + options.r * (i + o)", options=Options,
    ranked=False, zero_gradients=("a",),
    scale=lambda alpha, r, options: alpha / max(options.r, 1),
    tiny={"options": {"sparsity": 0.9}},
    form=method.Form(
        peft_type="SUPERTUNING", config=_config, block=_block,
        # Without them, a file does not say which entries it is of.
        neutral={"save_precomputed_indices": (True,)}))
