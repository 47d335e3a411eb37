"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv 2106.09685), and rsLoRA.

  h = x W0 + s dropout(x) A B        s = alpha / r   (eq. 3)

with W0 `[i, o]` frozen, A `[i, r]` ~ U(-1/sqrt(i), 1/sqrt(i)) (what
`kaiming_uniform(a=sqrt(5))` gives) and B `[r, o]` = 0, so that h = x W0 at
init (`starts` has others). rsLoRA (Kalajdzievski 2023, arXiv 2312.03732) has
s = alpha / sqrt(r). On embeddings the roles are reversed, as in Hugging Face
PEFT: A `[v, r]` = 0 and B `[r, d]` ~ N(0, 1).

Trainable parameters: r (i + o) a matrix.

Layers whose rank is smaller than the stack's are padded with zero columns in
A and zero rows in B. Both factors of the padded part are zero, hence so are
their gradients: it needs no mask.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import math
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import quant
from lora_jax import struct
from lora_jax import types
from lora_jax.adapters import additive
from lora_jax.adapters import base
from lora_jax.adapters import config as config_lib
from lora_jax.adapters import depth
from lora_jax.adapters import method
from lora_jax.adapters import starts


@struct.dataclass
class LoRA(additive.Additive):
  """Attributes (a leading `l` axis when stacked):

    a: `[i, r]`, down projection, float32.
    b: `[r, o]`, up projection, float32.
    scale: `[]`, s.
    rate: `[]`, dropout rate.
    rank: `[]` int32, the rank of this layer (0: not adapted).
    a0, b0: where A and B started, if they were taken out of the base.
  """

  pads: ClassVar[bool] = True

  a: types.Array = base.trained("in", None)
  b: types.Array = base.up(None, "out")
  scale: types.Array = base.frozen()
  rate: types.Array = base.frozen()
  rank: types.Array = base.frozen()
  a0: types.Array | None = base.frozen("in", None, default=None)
  b0: types.Array | None = base.frozen(None, "out", default=None)

  def down_up(self, x: types.Array) -> types.Array:
    """s x A B, `[..., o]`, in x's dtype."""
    h = x @ self.a.astype(x.dtype)
    return (h * self.scale.astype(x.dtype)) @ self.b.astype(x.dtype)

  def factors(self):
    return self.a, self.scale * self.b

  def lookup(self, tokens: types.Array, table: types.Array) -> types.Array:
    """Adapted embedding rows, `[..., d]` for `tokens [...]`."""
    low = jnp.take(self.a, tokens, axis=0)
    return quant.take(table, tokens) + (low * self.scale) @ self.b

  def narrowed(self, dtype):
    return dataclasses.replace(
        self, a=self.a.astype(dtype), b=self.b.astype(dtype))

  def delta(self) -> jax.Array:
    """s A B, `[i, o]` float32."""
    return self.scale * jnp.matmul(self.a, self.b, precision="highest")

  def size(self) -> int:
    """Trainable parameters, padding not counted."""
    (i, _), (_, o) = self.a.shape[-2:], self.b.shape[-2:]
    return int(self.rank.sum()) * (i + o)

  def to_peft(self, embedding: bool = False) -> dict[str, types.Array]:
    """PEFT's tensors of one unstacked module, by name suffix."""
    r = int(self.rank)
    a, b = self.a[:, :r].T, self.b[:r].T
    if embedding:
      return {"lora_embedding_A": a, "lora_embedding_B": b}
    return {"lora_A.weight": a, "lora_B.weight": b}

  def difference(self) -> LoRA:
    """One unstacked module as an adapter of the base before `starts` took
    A0 B0 out of it: `[A | A0]`, `[B ; -B0]`, of twice the rank."""
    r, width = int(self.rank), self.a.shape[1]
    pad = 2 * (width - r)
    a0 = 0 * self.a if self.a0 is None else self.a0
    b0 = 0 * self.b if self.b0 is None else self.b0
    return dataclasses.replace(
        self, rank=2 * self.rank, a0=None, b0=None,
        a=jnp.pad(jnp.concatenate([self.a[:, :r], a0[:, :r]], 1),
                  ((0, 0), (0, pad))),
        b=jnp.pad(jnp.concatenate([self.b[:r], -b0[:r]], 0),
                  ((0, pad), (0, 0))))

  def resized(self, kept, width):
    def columns(x):
      return x if x is None else jnp.pad(
          x[:, index], ((0, 0), (0, width - len(kept))))

    def rows(x):
      return x if x is None else columns(x.T).T

    index = np.asarray(kept, np.int32)
    return dataclasses.replace(
        self, rank=np.int32(len(kept)), a=columns(self.a), b=rows(self.b),
        a0=columns(self.a0), b0=rows(self.b0))

  def inert(self) -> Self:
    # Its products are not switched off by the rank, but by zeros.
    return dataclasses.replace(
        self, rank=0 * self.rank, scale=0 * self.scale, a=0 * self.a,
        b=0 * self.b)

  @classmethod
  def from_peft(cls, tensors, slot):
    a, b = _factors(tensors)
    pad = slot.width - a.shape[1]
    return cls(
        a=jnp.pad(jnp.asarray(a, jnp.float32), ((0, 0), (0, pad))),
        b=jnp.pad(jnp.asarray(b, jnp.float32), ((0, pad), (0, 0))),
        **slot.values())

  @classmethod
  def peft_rank(cls, tensors):
    name = "lora_embedding_A"
    return tensors[name if name in tensors else "lora_A.weight"].shape[0]


def _factors(tensors):
  """A `[i, r]` and B `[r, o]` of PEFT's tensors."""
  if "lora_embedding_A" in tensors:
    return tensors["lora_embedding_A"].T, tensors["lora_embedding_B"].T
  return tensors["lora_A.weight"].T, tensors["lora_B.weight"].T


def init(key, weight, slot, shared=None):
  """The adapter of one module before the first step; see `starts`."""
  del shared
  if slot.given is not None:
    a, b = slot.given
    return LoRA(a=a, b=b, a0=a, b0=b, **slot.values())
  if slot.stats is not None:
    a, b = slot.stats
    return LoRA(a=a, b=b, **slot.values())
  draw: Any = starts.embedding if slot.embedding else slot.start.draw
  a, b = draw(key, *weight.shape[-2:], slot.width, slot.rank)
  return LoRA(a=a, b=b, **slot.values())


def peft_config(config: config_lib.AdapterConfig) -> dict[str, Any]:
  """The keys of PEFT's `LoraConfig`."""
  alpha = float(config.alpha)
  found: dict[str, Any] = {
      "r": config.rank,
      "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
      "lora_dropout": float(config.dropout),
      "rank_pattern": dict(config.rank_pattern),
      "alpha_pattern": dict(config.alpha_pattern),
      "bias": "none",
      "fan_in_fan_out": False,
      "init_lora_weights": (
          True if config.init == "default" else config.init),
      "use_dora": False,
      "use_rslora": False,
  }
  if config.layer_replication:
    found["layer_replication"] = depth.ranges(config.layer_replication)
  if config.init == "loftq":
    found["loftq_config"] = {
        "loftq_bits": 4, "loftq_iter": config.loftq_iterations}
  return found


def block(config: Mapping[str, Any]) -> dict[str, Any]:
  """Fields of `AdapterConfig` of a `LoraConfig`."""
  found = {
      "rank": int(config["r"]), "alpha": config.get("lora_alpha", 8),
      "dropout": float(config.get("lora_dropout") or 0.0),
      "rank_pattern": config.get("rank_pattern") or {},
      "alpha_pattern": config.get("alpha_pattern") or {},
      "layer_replication": tuple(
          tuple(pair) for pair in config.get("layer_replication") or ())}
  init = config.get("init_lora_weights", True)
  if starts.replaces(init):
    loftq = config.get("loftq_config") or {}
    found |= {"init": init, "loftq_iterations": loftq.get("loftq_iter", 1)}
  return found  # Whatever other start it was, only the tensors count now.


# PEFT's options that change what is computed, and the values that do not.
# Some are methods of which there is more than a projection: aLoRA asks where
# its invocation tokens are, MonteCLoRA draws whole experts around A, VeLoRA
# trains by inputs that it has compressed.
NEUTRAL: dict[str, tuple] = {
    "bias": ("none",), "fan_in_fan_out": (False,), "lora_bias": (False,),
    "use_qalora": (False,),
    "target_parameters": (None, []), "alora_invocation_tokens": (None,),
    "use_bdlora": (None, False),
    "megatron_config": (None,), "arrow_config": (None,),
    "velora_config": (None,), "kasa_config": (None,),
    "monteclora_config": (None,), "use_dora": (False,),
    "use_rslora": (False,),
}


def neutral(*own: str) -> dict[str, tuple]:
  """`NEUTRAL` of a relative of LoRA that has options of its own."""
  return {name: values for name, values in NEUTRAL.items() if name not in own}


def form(**requires: Any) -> method.Form:
  """LoRA's form in PEFT, told from its relatives by `requires`."""
  return method.Form(
      peft_type="LORA", config=lambda c: peft_config(c) | requires,
      block=block, requires=requires, neutral=neutral(*requires))


METHOD = method.Method(
    summary="h = x W0 + (alpha/r) x A B", paper="arXiv 2106.09685",
    adapter=LoRA, init=init, count="r * (i + o)", embeddings=True,
    patterns=True, starts=None, zero_gradients=("a",), form=form(), vllm=True)
RSLORA = dataclasses.replace(
    METHOD, summary="h = x W0 + (alpha/sqrt(r)) x A B",
    paper="arXiv 2312.03732",
    scale=lambda alpha, r, options: alpha / math.sqrt(r),
    form=form(use_rslora=True))
