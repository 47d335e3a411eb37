"""Bottleneck adapters: a small MLP on what a block adds to the hidden states.

  houlsby   y' = y + act(y D + d) U + u    after attention and MLP, 1902.00751
  pfeiffer  the same after the MLP only                           2005.00247
  parallel  y' = y + s (act(x D + d) U + u)  beside the MLP, x its normed
            input                                                 2110.04366

with y `[b, t, d]` the block's output, D `[d, r]` ~ N(0, 0.02^2) and d = 0,
U `[r, d]` = 0 and u = 0, so that y' = y at init.

Trainable parameters: 2 r d + r + d a block.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from lora_jax import errors
from lora_jax import struct
from lora_jax import types
from lora_jax.adapters import base
from lora_jax.adapters import method

ACTIVATIONS = {
    "relu": jax.nn.relu, "gelu": jax.nn.gelu, "silu": jax.nn.silu,
    "tanh": jnp.tanh}


@dataclasses.dataclass(frozen=True)
class Options:
  """Attributes:

    activation: a key of `ACTIVATIONS`.
    scaling: s of the parallel one.
  """

  activation: str = "relu"
  scaling: float = 4.0

  def validate(self) -> None:
    errors.choose(
        "adapter.options.activation", self.activation, ACTIVATIONS)


@struct.dataclass
class Bottleneck(base.Adapter):
  """Attributes:

    down, down_bias: `[d, r]`, `[r]`.
    up, up_bias: `[r, d]`, `[d]`.
    scale: `[]`, 1 or s.
    rate: `[]`, dropout rate on what enters.
    rank: `[]` int32, the bottleneck of this layer (0: not adapted).
    activation: static.
  """

  down: types.Array = base.trained(None, None)
  down_bias: types.Array = base.trained(None)
  up: types.Array = base.up(None, None)
  up_bias: types.Array = base.up(None)
  scale: types.Array = base.frozen()
  rate: types.Array = base.frozen()
  rank: types.Array = base.frozen()
  activation: str = base.static(default="relu")

  # Whether it reads the block's input, not its output.
  beside: ClassVar[bool] = False

  def residual(self, x, y, noise=None):
    inner = x if self.beside else y
    if noise is not None:
      inner = noise.dropout(inner, self.rate)
    dtype = y.dtype
    h = inner @ self.down.astype(dtype) + self.down_bias.astype(dtype)
    # Columns beyond this layer's own rank are padding.
    used = jnp.arange(h.shape[-1]) < self.rank
    h = jnp.where(used, ACTIVATIONS[self.activation](h), 0)
    out = h @ self.up.astype(dtype) + self.up_bias.astype(dtype)
    return y + self.active(self.scale, 0.0).astype(dtype) * out

  def to_peft(self, embedding=False):
    r = int(self.rank)
    return {"down": self.down[:, :r], "down_bias": self.down_bias[:r],
            "up": self.up[:r], "up_bias": self.up_bias}

  @classmethod
  def from_peft(cls, tensors, slot):
    pad = slot.width - tensors["down"].shape[1]
    return cls(
        down=jnp.pad(tensors["down"], ((0, 0), (0, pad))),
        down_bias=jnp.pad(tensors["down_bias"], (0, pad)),
        up=jnp.pad(tensors["up"], ((0, pad), (0, 0))),
        up_bias=jnp.asarray(tensors["up_bias"]),
        activation=slot.options.activation, **slot.values())

  def size(self) -> int:
    r, d = int(self.rank.sum()), self.up.shape[-1]
    return r * (2 * d + 1) + d * int((self.rank > 0).sum())


@struct.dataclass
class Parallel(Bottleneck):
  """The same beside a block, not after it."""

  beside: ClassVar[bool] = True


def _init(cls):
  def init(key, weight, slot, shared=None):
    """The adapter of one block before the first step."""
    del weight, shared
    d, r = slot.geometry.d, slot.width
    used = jnp.arange(r) < slot.rank
    return cls(
        down=0.02 * jax.random.normal(key, (d, r)) * used,
        down_bias=jnp.zeros(r), up=jnp.zeros((r, d)), up_bias=jnp.zeros(d),
        activation=slot.options.activation, **slot.values())

  return init


def _method(summary, paper, targets, cls=Bottleneck, scale=None):
  return method.Method(
      summary=summary, paper=paper, adapter=cls, init=_init(cls),
      count="2 * r * d + r + d", options=Options, targets=targets,
      sites=("self_attn", "mlp"), mergeable=False, patterns=True,
      scale=scale or (lambda alpha, r, options: 1.0),
      zero_gradients=("down", "down_bias"))


HOULSBY = _method(
    "y' = y + act(y D) U after attention and MLP", "arXiv 1902.00751",
    "self_attn,mlp")
PFEIFFER = _method(
    "y' = y + act(y D) U after the MLP", "arXiv 2005.00247", "mlp")
PARALLEL = _method(
    "y' = y + s act(x D) U beside the MLP", "arXiv 2110.04366", "mlp",
    Parallel, lambda alpha, r, options: options.scaling)
