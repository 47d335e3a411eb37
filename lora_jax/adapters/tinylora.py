"""TinyLoRA: a few trained numbers between singular vectors (2602.04118).

  h = x W0 + dropout(x) A R B,   R = sum_k v_k P_k

with A = U_r S_r^1/2 `[i, r]` and B = S_r^1/2 V_r' `[r, o]` of the
(dequantised) weight's truncated SVD, and P `[u, r, r]` ~ N(0, 1 / r) of each
module its own; all of these are frozen. What is trained is v `[u]` = 0 at
init. With `weight_tying`, modules that follow each other in the model share
one: of n modules there are round(n (1 - weight_tying)) vectors, of which each
belongs to as many modules, and the last to those that are left, too.

P is what PEFT draws of the same `options.projection_seed` plus the module's
number, so that a folder need not hold it.

Trainable parameters: u a vector; as many vectors as matrices without tying.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import errors
from lora_jax import quant
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

    u: numbers in a vector.
    weight_tying: from 0, a vector for each module, to 1, one for all.
    projection_seed: of P.
    save_projection: whether a folder holds P.
    init_v_bound: where v starts, U(-bound, bound); 0: at 0.
  """

  u: int = 64
  weight_tying: float = 0.0
  projection_seed: int = 42
  save_projection: bool = True
  init_v_bound: float = 0.0

  def validate(self) -> None:
    """Raises a `UsageError` if a value is out of range."""
    if self.u < 1:
      raise errors.UsageError(
          f"adapter.options.u={self.u} is out of range; use 1 or more")
    if not 0.0 <= self.weight_tying <= 1.0:
      raise errors.UsageError(
          f"adapter.options.weight_tying={self.weight_tying} is out of range; "
          "use a share from 0 to 1")

  def groups(self, modules: int) -> int:
    """How many vectors that many modules have."""
    return max(1, round(modules * (1.0 - self.weight_tying)))


@struct.dataclass
class Vectors(base.Adapter):
  """What all modules share.

  Attributes:
    v: `[g, u]`, one a group of modules.
    p: `[n, u, r, r]`, one a module.
    saved: whether a folder holds P.
  """

  v: types.Array = base.up(None, None)
  p: types.Array = base.frozen()
  saved: bool = base.static(default=True)

  def to_peft(self, embedding=False):
    return {f"tinylora_v.{group}": v for group, v in enumerate(self.v)}


@struct.dataclass
class TinyLoRA(additive.Additive):
  """Attributes:

    a: `[i, r]`, of a table `[v, r]`.
    b: `[r, o]`.
    rate: `[]`, dropout rate.
    rank: `[]` int32, 0: not adapted.
    number: `[]` int32, its own among all modules.
    embedding: whether it adapts a table, for which R stands as PEFT has it;
      for others, it is that transposed.
    vectors: while it is used; see `Adapters.shared`.
  """

  a: types.Array = base.frozen("in", None)
  b: types.Array = base.frozen(None, "out")
  rate: types.Array = base.frozen()
  rank: types.Array = base.frozen()
  number: types.Array = base.frozen()
  embedding: bool = base.static(default=False)
  vectors: Any = base.frozen(default=None)

  def bound(self, shared):
    return dataclasses.replace(self, vectors=shared)

  @property
  def core(self) -> jax.Array:
    """R, `[r, r]` float32."""
    v, p = self.vectors.v, self.vectors.p[self.number]
    # The groups are of n // g modules; the last has what is left.
    size = max(1, self.vectors.p.shape[0] // v.shape[0])
    own = v[jnp.minimum(self.number // size, v.shape[0] - 1)]
    r = jnp.einsum("k,kab->ab", self.active(own, 0.0), p, precision="highest")
    return r if self.embedding else r.T

  def factors(self):
    return self.a, jnp.matmul(self.core, self.b, precision="highest")

  def lookup(self, tokens, table):
    _, b = self.factors()
    return quant.take(table, tokens) + jnp.take(self.a, tokens, axis=0) @ b

  def to_peft(self, embedding=False):
    down, up = self.a.T, self.b.T
    if embedding:
      down, up = up.T, down.T
    found = {"tinylora_A": down, "tinylora_B": up}
    if self.vectors.saved:
      found["tinylora_P"] = self.vectors.p[self.number]
    return found

  @classmethod
  def from_peft(cls, tensors, slot):
    down, up = (jnp.asarray(tensors[name], jnp.float32)
                for name in ("tinylora_A", "tinylora_B"))
    if slot.embedding:
      down, up = up.T, down.T
    return cls(a=down.T, b=up.T, number=np.int32(slot.number),
               embedding=slot.embedding, **slot.values("rate", "rank"))

  @classmethod
  def peft_rank(cls, tensors):
    return tensors["tinylora_A"].shape[0]


def share(key, modules):
  """v and P of all modules.

  Raises:
    errors.UsageError: if a weight has fewer directions than the rank.
  """
  options, n, r = modules.options, modules.count, modules.width
  for target, shape in modules.shapes.items():
    if r > min(shape):
      raise errors.UsageError(
          f"adapter.rank={r} is above the {min(shape)} directions of {target}; "
          "use a smaller rank")
  v = jax.random.uniform(
      key, (options.groups(n), options.u), jnp.float32,
      -options.init_v_bound, options.init_v_bound)
  return Vectors(v=v, p=_drawn(options, n, r), saved=options.save_projection)


def _drawn(options, n, r):
  return jnp.asarray(np.stack([
      torch_random.Generator(options.projection_seed + number).normal(
          (options.u, r, r), std=1.0 / r**0.5) for number in range(n)]))


def init(key, weight, slot, shared=None):
  """The adapter of one module before the first step."""
  del key, shared
  r = slot.width
  u, s, v = jnp.linalg.svd(
      quant.dequantize(weight, jnp.float32), full_matrices=False)
  u, s, v = u[:, :r], jnp.sqrt(s[:r]), v[:r]
  # A run that goes on elsewhere has the same: each column's largest entry
  # is positive.
  largest = jnp.argmax(jnp.abs(u), axis=0, keepdims=True)
  sign = jnp.sign(jnp.take_along_axis(u, largest, axis=0))
  return TinyLoRA(
      a=u * sign * s, b=(s * sign[0])[:, None] * v,
      number=jnp.asarray(slot.number, jnp.int32), embedding=slot.embedding,
      **slot.values("rate", "rank"))


def _config(config: config_lib.AdapterConfig) -> dict[str, Any]:
  options = config.options
  return {"r": config.rank, "tinylora_dropout": float(config.dropout),
          "u": options.u, "weight_tying": options.weight_tying,
          "projection_seed": options.projection_seed,
          "save_projection": options.save_projection,
          "init_weights": "uniform" if options.init_v_bound else True,
          "init_v_bound": options.init_v_bound or 0.02,
          "fan_in_fan_out": False, "bias": "none"}


def _block(config: Mapping[str, Any]) -> dict[str, Any]:
  options = method.named(Options, config)
  if config.get("init_weights") != "uniform":
    options["init_v_bound"] = 0.0
  return {"rank": int(config["r"]),
          "dropout": float(config.get("tinylora_dropout") or 0.0),
          "options": options}


def _shared(tensors, config, modules):
  options, n = config.options, modules.count
  v = jnp.stack([
      jnp.asarray(tensors[f"tinylora_v.{group}"], jnp.float32)
      for group in range(options.groups(n))])
  if not options.save_projection:
    return Vectors(v=v, p=_drawn(options, n, modules.width), saved=False)
  numbers = modules.numbers()
  own = {int(numbers[target][layer]): module["tinylora_P"]
         for target, present in modules.tensors.items()
         for layer, module in enumerate(present) if module is not None}
  return Vectors(v=v, p=jnp.asarray(
      np.stack([own[number] for number in range(n)]), jnp.float32))


METHOD = method.Method(
    summary="h = x W0 + x A (sum_k v_k P_k) B, A and B of W0's SVD",
    paper="arXiv 2602.04118", adapter=TinyLoRA, init=init, share=share,
    count="0", count_shared="u * options.groups(modules)", options=Options,
    embeddings=True, form=method.Form(
        peft_type="TINYLORA", config=_config, block=_block, shared=_shared,
        neutral={"bias": ("none",), "fan_in_fan_out": (False,)}))
