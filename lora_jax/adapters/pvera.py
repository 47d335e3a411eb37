"""PVeRA: VeRA with random activations (arXiv 2512.07703).

  h = x W0 + (m + e * exp(v / 2)) B * lambda_b
  (m, v) = (x A) * lambda_d

with A `[i, 2 r]` and B `[r, o]` frozen, random and the same for all modules,
as in `vera`: half of what A gives is a mean, half the logarithm of a variance.
In training e ~ N(0, 1) `[..., r]` for every token, else e = 0: the adapter is
then VeRA's, and is merged as that. lambda_d `[2 r]` = d_initial and lambda_b
`[o]` = 0 at init.

Trainable parameters: 2 r + o a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from lora_jax import quant
from lora_jax import struct
from lora_jax.adapters import config as config_lib
from lora_jax.adapters import method
from lora_jax.adapters import torch_random
from lora_jax.adapters import vera


@struct.dataclass
class Projections(vera.Projections):
  """What all modules share.

  Attributes:
    a: `[i, 2 r]` for the largest i.
    b: `[r, o]` for the largest o.
    saved: whether a folder holds them.
  """

  def to_peft(self, embedding=False):
    return {"pvera_A": self.a.T, "pvera_B": self.b.T} if self.saved else {}


@struct.dataclass
class PVeRA(vera.VeRA):
  """As VeRA's, but lambda_d `[2 r]` and a `[i, 2 r]`."""

  def _mean(self):
    r = self.b.shape[0]
    return self.a[:, :r], self.lambda_d[:r]

  def factors(self):
    a, lambda_d = self._mean()
    return a, lambda_d[:, None] * self.b * self.active(self.lambda_b, 0.0)

  def _up(self, h):
    y = h @ self.b.astype(h.dtype)
    return y * self.active(self.lambda_b, 0.0).astype(h.dtype)

  def down_up(self, x):
    a, lambda_d = self._mean()
    return self._up((x @ a.astype(x.dtype)) * lambda_d.astype(x.dtype))

  def apply(self, x, weight, noise=None):
    y = quant.matmul(x, weight)
    if noise is None:
      return y + self.down_up(x)
    x = noise.dropout(x, self.rate)
    h = (x @ self.a.astype(x.dtype)) * self.lambda_d.astype(x.dtype)
    mean, variance = jnp.split(h, 2, axis=-1)
    return y + self._up(mean + noise.normal(mean) * jnp.exp(0.5 * variance))

  def to_peft(self, embedding=False):
    return {"pvera_lambda_b": self.lambda_b, "pvera_lambda_d": self.lambda_d}

  @classmethod
  def from_peft(cls, tensors, slot):
    return cls(
        lambda_b=jnp.asarray(tensors["pvera_lambda_b"], jnp.float32),
        lambda_d=jnp.asarray(tensors["pvera_lambda_d"], jnp.float32),
        rows=slot.shape[0], **slot.values("rate", "rank"))


def share(key, modules):
  """A and B at the largest sizes."""
  del key  # PEFT has a seed of their own.
  options, width = modules.options, modules.width
  generator = torch_random.Generator(options.projection_key)
  i, o = vera.largest(modules.shapes)
  a = generator.kaiming_uniform((2 * width, i))
  b = generator.kaiming_uniform((o, width))
  return Projections(
      a=jnp.asarray(a.T), b=jnp.asarray(b.T), saved=options.save_projection)


def init(key, weight, slot, shared=None):
  """The adapter of one module before the first step."""
  del key, shared
  i, o = weight.shape[-2:]
  return PVeRA(
      lambda_b=jnp.zeros(o, jnp.float32),
      lambda_d=jnp.full(2 * slot.width, slot.options.d_initial, jnp.float32),
      rows=i, **slot.values("rate", "rank"))


def _config(config: config_lib.AdapterConfig) -> dict[str, Any]:
  return vera.config_keys(config, "pvera") | {"sample_at_inference": False}


def _block(config: Mapping[str, Any]) -> dict[str, Any]:
  return vera.block(config, "pvera")


def _shared(tensors, config, modules):
  if not config.options.save_projection:
    return share(None, modules)
  return Projections(a=jnp.asarray(tensors["pvera_A"], jnp.float32).T,
                     b=jnp.asarray(tensors["pvera_B"], jnp.float32).T)


METHOD = method.Method(
    summary="h = x W0 + (m + e * exp(v / 2)) B * lambda_b, "
            "(m, v) = (x A) * lambda_d",
    paper="arXiv 2512.07703", adapter=PVeRA, init=init, count="2 * r + o",
    options=vera.Options, share=share, zero_gradients=("lambda_d",),
    samples=True, form=method.Form(
        peft_type="PVERA", config=_config, block=_block, shared=_shared,
        neutral={"bias": ("none",), "fan_in_fan_out": (False,),
                 "sample_at_inference": (False,)}))
