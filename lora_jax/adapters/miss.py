"""MiSS: matrix shard sharing (Kang and Yin 2024, arXiv 2409.15371), once Bone.

  h = x W0 + dropout(x) S D,    D `[r, o]`,  S `[i, r]` = the identity, repeated

so that x S is the sum of x's shards of r values (the last padded with zeros),
and the r rows of D are shared by all of W0's. `init_weights` has PEFT's names
for its variants:

  default  D is trained whole
  mini     D `[r, mini_r]` is repeated to o columns
  bat      D is o/r blocks D_p `[r, r]`; block (q, p) of W0 `[i, o]`, r x r,
           becomes W_qp + D_p' (W_qp + 1). It needs W0 itself, r divides i and
           o, and there is no dropout.

D = 0 at init, so that h = x W0.

Trainable parameters: r o a matrix; mini: r mini_r.
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
from lora_jax.adapters import pieces

VARIANTS = {"default": True, "mini": "mini", "bat": "bat"}  # In PEFT's configs.


@dataclasses.dataclass(frozen=True)
class Options:
  """Attributes:

    init_weights: "default", "mini" or "bat".
    mini_r: columns of D in "mini"; it divides o.
  """

  init_weights: str = "default"
  mini_r: int = 1

  def validate(self) -> None:
    """Raises a `UsageError` if a value is none that is known."""
    errors.choose("adapter.options.init_weights", self.init_weights, VARIANTS)
    if self.mini_r < 1:
      raise errors.UsageError(
          f"adapter.options.mini_r={self.mini_r} is out of range; use a "
          "positive number that divides the outputs")


@struct.dataclass
class MiSS(additive.Additive):
  """Attributes (a leading `l` axis when stacked):

    block: D `[r, o]`.
    rate: `[]`, dropout rate.
    rank: `[]` int32, 0: not adapted.
    shape: (i, o).
  """

  block: types.Array = base.trained(None, "out")
  rate: types.Array = base.frozen()
  rank: types.Array = base.frozen()
  shape: tuple[int, int] = base.static(default=(0, 0))

  def rows(self) -> jax.Array:
    """D `[r, o]`."""
    return self.active(self.block, 0.0)

  def factors(self):
    d = self.rows()
    r, i = d.shape[0], self.shape[0]
    return jnp.tile(jnp.eye(r, dtype=jnp.float32), (-(-i // r), 1))[:i], d

  def down_up(self, x):
    d = self.rows().astype(x.dtype)
    r = d.shape[0]
    short = -self.shape[0] % r
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, short)])
    shards = x.reshape(*x.shape[:-1], -1, r).astype(jnp.float32)
    return jnp.sum(shards, -2).astype(x.dtype) @ d

  def to_peft(self, embedding=False):
    return {"miss_block": self.block}

  @classmethod
  def from_peft(cls, tensors, slot):
    return cls.made(jnp.asarray(tensors["miss_block"], jnp.float32), slot)

  @classmethod
  def made(cls, block: types.Array, slot: base.Slot):
    """One with D as it is stored."""
    i, o = slot.shape
    return cls(block=block, shape=(i, o), **slot.values("rate", "rank"))


@struct.dataclass
class Mini(MiSS):
  """MiSS with attribute:

    block: `[r, mini_r]`.
  """

  block: types.Array = base.trained()

  def rows(self):
    times = self.shape[1] // self.block.shape[-1]
    return jnp.tile(self.active(self.block, 0.0), (1, times))


@struct.dataclass
class Bat(base.Adapter):
  """Attributes (a leading `l` axis when stacked):

    block: D `[p, r, r]`.
    rank: `[]` int32, 0: not adapted.
  """

  block: types.Array = base.trained()
  rank: types.Array = base.frozen()

  def delta(self, weight: types.Tree) -> jax.Array:
    """D_p' (W_qp + 1) in block (q, p), `[i, o]` float32."""
    w = jax.lax.stop_gradient(quant.dequantize(weight, jnp.float32))
    d = self.active(self.block, 0.0)
    r = d.shape[-1]
    blocks = w.reshape(w.shape[0] // r, r, -1, r)
    found = jnp.einsum("qvpu,pvs->qspu", blocks, d, precision="highest")
    return (found + d.transpose(2, 0, 1)).reshape(w.shape)

  def apply(self, x, weight, noise=None):
    del noise
    return quant.matmul(x, weight) + pieces.dense(x, Bat.delta, self, weight)

  def merge(self, weight):
    return quant.dequantize(weight, jnp.float32) + self.delta(weight)

  def to_peft(self, embedding=False):
    return {"miss_block": self.block}

  @classmethod
  def from_peft(cls, tensors, slot):
    return cls.made(jnp.asarray(tensors["miss_block"], jnp.float32), slot)

  @classmethod
  def made(cls, block: types.Array, slot: base.Slot):
    """One with D as it is stored."""
    return cls(block=block, rank=slot.rank)


KINDS: dict[str, type[MiSS] | type[Bat]] = {
    "default": MiSS, "mini": Mini, "bat": Bat}


def kind(slot: base.Slot) -> type[MiSS] | type[Bat]:
  """Which of the variants a place has."""
  return KINDS[slot.options.init_weights]


def init(key, weight, slot, shared=None):
  """The adapter of one module before the first step.

  Raises:
    errors.UsageError: if r or mini_r does not fit the weight.
  """
  del key, shared
  (i, o), r, options = weight.shape[-2:], slot.width, slot.options
  shape: tuple[int, ...] = (r, o)
  if options.init_weights == "bat":
    if i % r or o % r:
      raise errors.UsageError(
          f'adapter.rank={r} does not divide {i} x {o} of "{slot.target}", '
          "as init_weights=bat needs it; use a common divisor, or default")
    shape = (o // r, r, r)
  elif options.init_weights == "mini":
    if o % options.mini_r:
      raise errors.UsageError(
          f"adapter.options.mini_r={options.mini_r} does not divide the {o} "
          f'outputs of "{slot.target}"; use a divisor')
    shape = (r, options.mini_r)
  if r > i:
    raise errors.UsageError(
        f'adapter.rank={r} is more than the {i} inputs of "{slot.target}"; '
        "use at most as many")
  return kind(slot).made(
      jnp.zeros(shape, jnp.float32), slot.replace(shape=(i, o)))


def _config(config: config_lib.AdapterConfig) -> dict[str, Any]:
  options = config.options
  return {"r": config.rank, "miss_dropout": float(config.dropout),
          "mini_r": options.mini_r, "bias": "none",
          "init_weights": VARIANTS[options.init_weights]}


def _block(config: Mapping[str, Any]) -> dict[str, Any]:
  variant = config.get("init_weights")
  return {"rank": int(config["r"]),
          "dropout": float(config.get("miss_dropout") or 0.0),
          "options": {
              "init_weights": variant if variant in KINDS else "default",
              "mini_r": config.get("mini_r", 1)}}


METHOD = method.Method(
    summary="h = x W0 + sum of x's shards D", paper="arXiv 2409.15371",
    adapter=MiSS, init=init, kind=kind, options=Options,
    count="r * (mini_r if init_weights == 'mini' else o)",
    form=method.Form(
        peft_type="MISS", config=_config, block=_block,
        neutral={"bias": ("none",)}))
