"""RoAd: rotations of pairs of outputs (Liao and Monz 2024, arXiv 2409.00119).

  h = rotate(x W0 + bias):  z_1' = a cos(t) z_1 - a sin(t) z_2
                            z_2' = a cos(t) z_2 + a sin(t) z_1

for z_1, z_2 at equal places in the two halves of each group of outputs. t = 0
and a = 1 at init. Variants by how much of t and a is shared: road_1 has one of
each a pair, road_2 one an output, road_4 two an output (one for the cosine's
column and one for the sine's).

Trainable parameters: o, 2 o or 4 o a matrix.
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

# Angles (and as many scales) an output.
VARIANTS = {"road_1": 0.5, "road_2": 1.0, "road_4": 2.0}


@dataclasses.dataclass(frozen=True)
class Options:
  """Attributes:

    variant: a key of `VARIANTS`.
    group_size: outputs of a group, even.
  """

  variant: str = "road_1"
  group_size: int = 64

  def validate(self) -> None:
    """Raises a `UsageError` if a value is out of range."""
    errors.choose("adapter.options.variant", self.variant, VARIANTS)
    if self.group_size < 2 or self.group_size % 2:
      raise errors.UsageError(
          f"adapter.options.group_size={self.group_size} is out of range; use "
          "an even number")

  def angles(self, o: int) -> int:
    """Of o outputs."""
    return int(VARIANTS[self.variant] * o)


@struct.dataclass
class Road(base.Adapter):
  """Attributes:

    theta, alpha: `[o / 2]`, `[o]` or `[2 o]`.
    rank: `[]` int32, 0: not adapted.
    options: static, the method's.
  """

  theta: types.Array = base.trained(None)
  alpha: types.Array = base.trained(None)
  rank: types.Array = base.frozen()
  options: Options = base.static(default=Options())

  def _columns(self) -> tuple[jax.Array, jax.Array]:
    """What an output, and its partner, is multiplied by: `[o]` each."""
    group, variant = self.options.group_size, self.options.variant
    if variant == "road_4":
      theta = self.theta.reshape(-1, 2, group)
      alpha = self.alpha.reshape(-1, 2, group)
      first = alpha[:, 0] * jnp.cos(theta[:, 0])
      second = alpha[:, 1] * jnp.sin(theta[:, 1])
    else:
      shape = (-1, 1 if variant == "road_1" else 2, group // 2)
      theta, alpha = self.theta.reshape(shape), self.alpha.reshape(shape)
      full = (theta.shape[0], 2, group // 2)
      first = jnp.broadcast_to(alpha * jnp.cos(theta), full)
      second = jnp.broadcast_to(alpha * jnp.sin(theta), full)
    return (self.active(first.reshape(-1), 1.0),
            self.active(second.reshape(-1), 0.0))

  def rotated(self, z: types.Array) -> jax.Array:
    """z `[..., o]` rotated, float32."""
    first, second = self._columns()
    wide = jnp.asarray(z, jnp.float32)
    halves = wide.reshape(*z.shape[:-1], -1, 2, self.options.group_size // 2)
    partner = jnp.stack([-halves[..., 1, :], halves[..., 0, :]], axis=-2)
    return wide * first + partner.reshape(z.shape) * second

  def apply(self, x, weight, noise=None):
    del noise
    return self.rotated(quant.matmul(x, weight)).astype(x.dtype)

  def shift(self, bias):
    return None if bias is None else self.rotated(bias)

  def merge(self, weight):
    return self.rotated(quant.dequantize(weight, jnp.float32))

  def to_peft(self, embedding=False):
    return {"road_theta": self.theta, "road_alpha": self.alpha}

  @classmethod
  def from_peft(cls, tensors, slot):
    return cls(theta=jnp.asarray(tensors["road_theta"], jnp.float32),
               alpha=jnp.asarray(tensors["road_alpha"], jnp.float32),
               rank=slot.rank, options=slot.options)


def init(key, weight, slot, shared=None):
  """The adapter of one module before the first step.

  Raises:
    errors.UsageError: if groups do not divide the outputs.
  """
  del key, shared
  o, group = weight.shape[-1], slot.options.group_size
  if o % group:
    raise errors.UsageError(
        f"adapter.options.group_size={group} does not divide the {o} outputs "
        f"of {slot.target}; choose one that does")
  size = slot.options.angles(o)
  return Road(theta=jnp.zeros(size, jnp.float32),
              alpha=jnp.ones(size, jnp.float32), rank=slot.rank,
              options=slot.options)


def _config(config: config_lib.AdapterConfig) -> dict[str, Any]:
  return {"variant": config.options.variant,
          "group_size": config.options.group_size, "init_weights": True}


def _block(config: Mapping[str, Any]) -> dict[str, Any]:
  return {"options": {name: config[name] for name in ("variant", "group_size")
                      if name in config}}


METHOD = method.Method(
    summary="h = rotations of pairs of x W0, scaled",
    paper="arXiv 2409.00119", adapter=Road, init=init,
    count="2 * options.angles(o)", options=Options, ranked=False,
    # Of 31 words of the test's head no group is a half.
    tiny={"options": {"group_size": 8}, "targets": "q_proj,up_proj,down_proj"},
    form=method.Form(peft_type="ROAD", config=_config, block=_block))
