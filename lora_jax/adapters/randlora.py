"""RandLoRA: full-rank sums of random bases (Albert et al. 2025, 2502.00987).

  h = x W0 + s sum_n x A_n L_n B G_n          s = alpha / r   (eq. 4)

With m = min(i, o): N = ceil(m / r) random bases of rank r, frozen and the same
for all modules, of which one side `[r, m]` is the same for every n, too. What
is trained are L `[r, N]` (lambda), which weights the columns of the bases, and
G `[N, m]` (gamma), which weights what they span; the sum may have full rank.
L = 0 at the start and G = 1 / max(N, m).

Where i <= o the one side stands at the input. As in PEFT, entry k of its
r N = (r, N) columns meets entry k of the other side's (N, r) rows; as both are
random, it does not matter which.

Trainable parameters: r N + N m a matrix.

The bases are those that PEFT draws of the same `options.projection_key`, with
torch 2.13. A folder need not hold them: with `save_projection` it has a whole
copy of them for every module, as PEFT's has.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax import struct
from lora_jax import types
from lora_jax.adapters import additive
from lora_jax.adapters import base
from lora_jax.adapters import config as config_lib
from lora_jax.adapters import method
from lora_jax.adapters import torch_random
from lora_jax.adapters import vera


@dataclasses.dataclass(frozen=True)
class Options:
  """Attributes:

    projection_key: seed of the bases.
    save_projection: whether a folder holds them.
    sparse: whether they are 0 but for one entry in 3, +-1 (Li et al. 2006).
    very_sparse: the same of one entry in sqrt(m).
  """

  projection_key: int = 0
  save_projection: bool = False
  sparse: bool = False
  very_sparse: bool = False


@struct.dataclass
class Bases(base.Adapter):
  """What all modules share.

  Attributes:
    a: `[r, m]` for the largest m.
    b: `[max(i, o), N, r]` for the largest sizes.
    saved: whether a folder holds them.
  """

  a: types.Array = base.frozen()
  b: types.Array = base.frozen()
  saved: bool = base.static(default=False)

  def to_peft(self, embedding=False):
    if not self.saved:
      return {}
    return {"randlora_A": self.a[:, None], "randlora_B": self.b}

  def size(self) -> int:
    return 0


@struct.dataclass
class RandLoRA(additive.Additive):
  """Attributes:

    lambda_: `[r, N]`.
    gamma: `[N, m]`.
    scale: `[]`, s.
    rate: `[]`, dropout rate.
    rank: `[]` int32, 0: not adapted.
    rows, columns: i and o.
    bases: while it is used; see `Adapters.shared`.
  """

  lambda_: types.Array = base.trained(None, None)
  gamma: types.Array = base.trained(None, None)
  scale: types.Array = base.frozen()
  rate: types.Array = base.frozen()
  rank: types.Array = base.frozen()
  rows: int = base.static(default=0)
  columns: int = base.static(default=0)
  bases: Any = base.frozen(default=None)

  def bound(self, shared):
    return dataclasses.replace(self, bases=shared)

  def _factors(self):
    """Down `[i, r N]` and up `[r N, o]`: too many columns to be joined to
    those of the frozen product (`factors`)."""
    (r, n), m = self.lambda_.shape, self.gamma.shape[-1]
    one = self.bases.a[:, None, :m]
    trained = (self.lambda_[:, :, None] * one * self.gamma).reshape(r * n, m)
    trained = self.active(self.scale, 0.0) * trained
    other = self.bases.b[:max(self.rows, self.columns), :n]
    other = other.reshape(other.shape[0], n * r)
    if self.rows == m:
      return trained.T, other.T
    return other, trained

  def to_peft(self, embedding=False):
    return {"randlora_lambda": self.lambda_,
            "randlora_gamma": self.gamma} | self.bases.to_peft()

  @classmethod
  def from_peft(cls, tensors, slot):
    i, o = slot.shape
    return cls(
        lambda_=jnp.asarray(tensors["randlora_lambda"], jnp.float32),
        gamma=jnp.asarray(tensors["randlora_gamma"], jnp.float32),
        rows=i, columns=o, **slot.values())


def share(key, modules):
  """The bases at the largest sizes, each side of standard deviation 1."""
  del key  # PEFT has a seed of their own.
  options, width = modules.options, modules.width
  m, size = sorted(vera.largest(modules.shapes))
  n = -(-m // width)
  generator = torch_random.Generator(options.projection_key)
  if options.sparse or options.very_sparse:
    rate = math.sqrt(m) if options.very_sparse else 3
    a = _ternary(generator.uniform((width, 1, m)), rate)
    b = _ternary(generator.uniform((size, n, width)), rate)
  else:
    def draw(shape):
      return generator.kaiming_uniform(shape, math.sqrt(5), jnp.bfloat16)

    a = draw((width, 1, m))
    b = np.concatenate([draw((size, 1, width)) for _ in range(n)], 1)
  return Bases(a=_normalised(a)[:, 0], b=_normalised(b),
               saved=options.save_projection)


def _ternary(uniform: np.ndarray, rate: float) -> np.ndarray:
  edge = 1 / (2 * rate)
  return np.where(uniform < edge, -1, np.where(
      uniform > 1 - edge, 1, 0)).astype(np.float32)


def _normalised(x: np.ndarray):
  """x over its standard deviation, in its own precision, as float32."""
  wide = x.astype(np.float32)
  deviation = wide.std(ddof=1, dtype=np.float64).astype(x.dtype)
  return jnp.asarray(
      (wide / deviation.astype(np.float32)).astype(x.dtype), jnp.float32)


def init(key, weight, slot, shared=None):
  """The adapter of one module before the first step."""
  del key, shared
  i, o = weight.shape[-2:]
  m = min(i, o)
  n = -(-m // slot.width)
  return RandLoRA(
      lambda_=jnp.zeros((slot.width, n), jnp.float32),
      gamma=jnp.full((n, m), 1 / max(n, m), jnp.float32),
      rows=i, columns=o, **slot.values())


def _config(config: config_lib.AdapterConfig) -> dict[str, Any]:
  alpha, options = float(config.alpha), config.options
  return {"r": config.rank,
          "randlora_alpha": int(alpha) if alpha.is_integer() else alpha,
          "randlora_dropout": float(config.dropout),
          "projection_prng_key": options.projection_key,
          "save_projection": options.save_projection,
          "sparse": options.sparse, "very_sparse": options.very_sparse,
          "fan_in_fan_out": False, "bias": "none", "init_weights": True}


def _block(config: Mapping[str, Any]) -> dict[str, Any]:
  return {"rank": int(config["r"]),
          "alpha": config.get("randlora_alpha", 640),
          "dropout": float(config.get("randlora_dropout") or 0.0),
          "options": {"save_projection": True} | method.named(
              Options, config) | {
                  "projection_key": config["projection_prng_key"]}}


def _shared(tensors, config, modules):
  if not config.options.save_projection:
    return share(None, modules)
  a, b = (jnp.asarray(tensors[name], jnp.float32)
          for name in ("randlora_A", "randlora_B"))
  return Bases(a=a[:, 0], b=b, saved=True)


METHOD = method.Method(
    summary="h = x W0 + (alpha/r) sum_n x A_n L_n B G_n",
    paper="arXiv 2502.00987", adapter=RandLoRA, init=init,
    count="(r + min(i, o)) * -(-min(i, o) // r)", options=Options,
    share=share, zero_gradients=("gamma",),
    form=method.Form(
        peft_type="RANDLORA", config=_config, block=_block, shared=_shared,
        neutral={"bias": ("none",), "fan_in_fan_out": (False,)}))
