"""PEANuT: a small network of the weight is its change (arXiv 2410.01870).

  h = x W0 + s (x H) B,   H = net(W0)  [i, r]

  net: H = act(W0 A); `depth` times H_n = act(H_(n-1) E_n), and as often
       H = act(H D_n) + what the encoder E of the same level read

with A `[o, r]` ~ U(-1/sqrt(o), 1/sqrt(o)), E_n, D_n `[r, r]` likewise of r, and
B `[r, o]` = 0, so that h = x W0 at init. H is made anew from the frozen weight
in every pass; no second `[i, o]` matrix is.

Trainable parameters: 2 r o + 2 depth r^2 a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import functools
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

TANH_GELU = functools.partial(jax.nn.gelu, approximate=True)
# By transformers' names.
ACTIVATIONS: dict[str, Callable[[types.Array], types.Array]] = {
    "relu": jax.nn.relu, "gelu": functools.partial(
        jax.nn.gelu, approximate=False),
    "gelu_new": TANH_GELU, "gelu_pytorch_tanh": TANH_GELU,
    "silu": jax.nn.silu, "swish": jax.nn.silu, "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid}


@dataclasses.dataclass(frozen=True)
class Options:
  """Attributes:

    depth: layers between A and B, on either side.
    act_fn: a key of `ACTIVATIONS`.
    scaling: s.
  """

  depth: int = 0
  act_fn: str = "relu"
  scaling: float = 1.0

  def validate(self) -> None:
    """Raises a `UsageError` if a value is out of range."""
    errors.choose("adapter.options.act_fn", self.act_fn, ACTIVATIONS)
    if self.depth < 0:
      raise errors.UsageError(
          f"adapter.options.depth={self.depth} is out of range; use 0 or more")


@struct.dataclass
class Peanut(base.Adapter):
  """Attributes:

    a: `[o, r]`.
    b: `[r, o]`.
    encoders, decoders: `[depth, r, r]`, or None.
    scale: `[]`, s.
    rank: `[]` int32, 0: not adapted.
    h: H `[i, r]`, where it is known beforehand (`prepared`).
    act_fn: static.
  """

  a: types.Array = base.trained("out", None)
  b: types.Array = base.up(None, "out")
  scale: types.Array = base.frozen()
  rank: types.Array = base.frozen()
  encoders: types.Array = base.trained(None, None, None, default=None)
  decoders: types.Array = base.trained(None, None, None, default=None)
  h: types.Array = base.frozen("in", None, default=None)
  act_fn: str = base.static(default="relu")

  def hidden(self, weight: types.Tree) -> jax.Array:
    """H, `[i, r]` float32."""
    if self.h is not None:
      return self.h
    act = ACTIVATIONS[self.act_fn]

    def product(x, y):
      return act(jnp.matmul(x, y, precision="highest"))

    h = product(quant.dequantize(weight, jnp.float32), self.a)
    if self.encoders is None:
      return h
    levels = []
    for encoder in self.encoders:
      levels.append(h)
      h = product(h, encoder)
    for decoder in self.decoders:
      h = product(h, decoder) + levels.pop()
    return h

  def prepared(self, weight, shared=None):
    return dataclasses.replace(self, h=self.hidden(weight))

  @property
  def up(self) -> jax.Array:
    """s B `[r, o]`."""
    return self.active(self.scale * self.b, 0.0)

  def factors(self):
    return None if self.h is None else (self.h, self.up)

  def down_up(self, x):
    return (x @ self.h.astype(x.dtype)) @ self.up.astype(x.dtype)

  def apply(self, x, weight, noise=None):
    del noise
    # The weight in float32 is not kept for the backward pass.
    h = jax.checkpoint(Peanut.hidden)(self, jax.lax.stop_gradient(weight))
    return quant.matmul(x, weight) + dataclasses.replace(
        self, h=h).down_up(x)

  def merge(self, weight):
    return quant.dequantize(weight, jnp.float32) + jnp.matmul(
        self.hidden(weight), self.up, precision="highest")

  def to_peft(self, embedding=False):
    found = {"peanut_A.weight": self.a.T, "peanut_B.weight": self.b.T}
    for name in ("encoders", "decoders"):
      part = getattr(self, name)
      for n in range(0 if part is None else part.shape[0]):
        found[f"peanut_{name}.{n}.weight"] = part[n].T
    return found

  @classmethod
  def from_peft(cls, tensors, slot):
    def part(name):
      return jnp.asarray(tensors[f"peanut_{name}.weight"], jnp.float32).T

    def several(name):
      numbers = range(slot.options.depth)
      return jnp.stack([part(f"{name}.{n}") for n in numbers]) if numbers else (
          None)

    return cls(a=part("A"), b=part("B"), encoders=several("encoders"),
               decoders=several("decoders"), act_fn=slot.options.act_fn,
               **slot.values("scale", "rank"))

  @classmethod
  def peft_rank(cls, tensors):
    return tensors["peanut_A.weight"].shape[0]


def init(key, weight, slot, shared=None):
  """The adapter of one module before the first step."""
  del shared
  o, r, depth = weight.shape[-1], slot.width, slot.options.depth
  keys = jax.random.split(key, 3)
  inner = [pieces.uniform(k, (depth, r, r), r) if depth else None
           for k in keys[1:]]
  return Peanut(
      a=pieces.uniform(keys[0], (o, r), o), b=jnp.zeros((r, o), jnp.float32),
      encoders=inner[0], decoders=inner[1], act_fn=slot.options.act_fn,
      **slot.values("scale", "rank"))


def _config(config: config_lib.AdapterConfig) -> dict[str, Any]:
  return {"r": config.rank, "init_weights": True,
          **dataclasses.asdict(config.options)}


def _block(config: Mapping[str, Any]) -> dict[str, Any]:
  return {"rank": int(config["r"]), "options": method.named(Options, config)}


METHOD = method.Method(
    summary="h = x W0 + s (x act(W0 A)) B", paper="arXiv 2410.01870",
    adapter=Peanut, init=init, count="2 * r * o + 2 * depth * r * r",
    options=Options, scale=lambda alpha, r, options: options.scaling,
    zero_gradients=("a", "encoders", "decoders"),
    tiny={"options": {"depth": 1}},
    form=method.Form(peft_type="PEANUT", config=_config, block=_block))
