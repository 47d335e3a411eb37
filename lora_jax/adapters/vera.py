"""VeRA: vector-based random matrix adaptation (Kopiczko et al., 2310.11454).

  h = x W0 + ((x A) * lambda_d) B * lambda_b

with A `[i, r]` and B `[r, o]` frozen, random and the same for all modules
(slices of one pair at the largest sizes), lambda_d `[r]` = d_initial and
lambda_b `[o]` = 0 at init. A and B are those that PEFT draws of the same
`options.projection_key`, Kaiming-uniform with gain sqrt 2, so that neither
optimiser nor checkpoint holds them, and a folder need not.

Trainable parameters: r + o a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax.numpy as jnp

from lora_jax import struct
from lora_jax import types
from lora_jax.adapters import additive
from lora_jax.adapters import base
from lora_jax.adapters import config as config_lib
from lora_jax.adapters import method
from lora_jax.adapters import torch_random


@dataclasses.dataclass(frozen=True)
class Options:
  """Attributes:

    d_initial: where lambda_d starts.
    projection_key: seed of A and B.
    save_projection: whether a folder holds them.
  """

  d_initial: float = 0.1
  projection_key: int = 0
  save_projection: bool = True


@struct.dataclass
class Projections(base.Adapter):
  """What all modules share.

  Attributes:
    a: `[i, r]` for the largest i.
    b: `[r, o]` for the largest o.
    saved: whether a folder holds them.
  """

  a: types.Array = base.frozen()
  b: types.Array = base.frozen()
  saved: bool = base.static(default=True)

  def to_peft(self, embedding=False):
    return {"vera_A": self.a.T, "vera_B": self.b.T} if self.saved else {}

  def size(self) -> int:
    return 0


@struct.dataclass
class VeRA(additive.Additive):
  """Attributes:

    lambda_b: `[o]`.
    lambda_d: `[r]`.
    rate: `[]`, dropout rate.
    rank: `[]` int32, 0: not adapted.
    rows: i.
    a, b: `[i, r]` and `[r, o]`, while it is used; see `Adapters.shared`.
  """

  lambda_b: types.Array = base.up("out")
  lambda_d: types.Array = base.trained(None)
  rate: types.Array = base.frozen()
  rank: types.Array = base.frozen()
  rows: int = base.static(default=0)
  a: types.Array = base.frozen(default=None)
  b: types.Array = base.frozen(default=None)

  def bound(self, shared):
    return dataclasses.replace(
        self, a=shared.a[:self.rows, :self.lambda_d.shape[-1]],
        b=shared.b[:self.lambda_d.shape[-1], :self.lambda_b.shape[-1]])

  def factors(self):
    scaled = self.b * self.active(self.lambda_b, 0.0)
    return self.a, self.lambda_d[:, None] * scaled

  def down_up(self, x):
    h = (x @ self.a.astype(x.dtype)) * self.lambda_d.astype(x.dtype)
    y = h @ self.b.astype(x.dtype)
    return y * self.active(self.lambda_b, 0.0).astype(x.dtype)

  def to_peft(self, embedding=False):
    return {"vera_lambda_b": self.lambda_b, "vera_lambda_d": self.lambda_d}

  @classmethod
  def from_peft(cls, tensors, slot):
    return cls(
        lambda_b=jnp.asarray(tensors["vera_lambda_b"], jnp.float32),
        lambda_d=jnp.asarray(tensors["vera_lambda_d"], jnp.float32),
        rows=slot.shape[0], **slot.values("rate", "rank"))


def share(key, modules):
  """A and B at the largest sizes."""
  del key  # PEFT has a seed of their own.
  options, width = modules.options, modules.width
  generator = torch_random.Generator(options.projection_key)
  i, o = largest(modules.shapes)
  a = generator.kaiming_uniform((width, i))
  b = generator.kaiming_uniform((o, width))
  return Projections(
      a=jnp.asarray(a.T), b=jnp.asarray(b.T), saved=options.save_projection)


def largest(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
  """The largest i and the largest o of the shapes `(i, o)`."""
  i, o = (max(sizes) for sizes in zip(*shapes.values(), strict=True))
  return i, o


def init(key, weight, slot, shared=None):
  """The adapter of one module before the first step."""
  del key, shared
  i, o = weight.shape[-2:]
  return VeRA(
      lambda_b=jnp.zeros(o, jnp.float32),
      lambda_d=jnp.full(slot.width, slot.options.d_initial, jnp.float32),
      rows=i, **slot.values("rate", "rank"))


def config_keys(
    config: config_lib.AdapterConfig, name: str = "vera") -> dict[str, Any]:
  """The keys of PEFT's config; `name` of the method, as its dropout has it."""
  options = config.options
  return {"r": config.rank, f"{name}_dropout": float(config.dropout),
          "d_initial": options.d_initial,
          "projection_prng_key": options.projection_key,
          "save_projection": options.save_projection,
          "fan_in_fan_out": False, "bias": "none", "init_weights": True}


def block(config: Mapping[str, Any], name: str = "vera") -> dict[str, Any]:
  """Inverse of `config_keys`."""
  return {"rank": int(config["r"]),
          "dropout": float(config.get(f"{name}_dropout") or 0.0),
          "options": method.named(Options, config) | {
              "projection_key": config["projection_prng_key"]}}


def _shared(tensors, config, modules):
  if not config.options.save_projection:
    return share(None, modules)
  return Projections(a=jnp.asarray(tensors["vera_A"], jnp.float32).T,
                     b=jnp.asarray(tensors["vera_B"], jnp.float32).T)


METHOD = method.Method(
    summary="h = x W0 + ((x A) * lambda_d) B * lambda_b",
    paper="arXiv 2310.11454", adapter=VeRA, init=init, count="r + o",
    options=Options, share=share, zero_gradients=("lambda_d",),
    form=method.Form(
        peft_type="VERA", config=config_keys, block=block, shared=_shared,
        neutral={"bias": ("none",), "fan_in_fan_out": (False,)}))
