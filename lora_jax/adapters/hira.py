"""HiRA: Hadamard high-rank adaptation (Huang et al., ICLR 2025, TwJrTz9cRS).

  h = x W0 + dropout(x) (W0 * (A B))

with W0 `[i, o]` frozen, A `[i, r]` ~ U(-1/sqrt(i), 1/sqrt(i)) and B `[r, o]` =
0, so that h = x W0 at init (init="gaussian": A ~ N(0, 1/r^2)). There is no
scale. W0 * (A B) is of up to r times W0's rank, and every product needs it
whole: it is made from the weight in each pass. On embeddings, whose rows are
E * (A B + 1), A `[v, r]` = 0 and B `[r, d]` ~ N(0, 1).

Trainable parameters: r (i + o) a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import quant
from lora_jax import struct
from lora_jax import types
from lora_jax.adapters import base
from lora_jax.adapters import config as config_lib
from lora_jax.adapters import method
from lora_jax.adapters import pieces
from lora_jax.adapters import starts


@struct.dataclass
class HiRA(base.Adapter):
  """Attributes (a leading `l` axis when stacked):

    a: `[i, r]`.
    b: `[r, o]`.
    rate: `[]`, dropout rate.
    rank: `[]` int32, 0: not adapted; what is wider is not used.
  """

  a: types.Array = base.trained("in", None)
  b: types.Array = base.up(None, "out")
  rate: types.Array = base.frozen()
  rank: types.Array = base.frozen()

  def _columns(self):
    return self.a * pieces.used(self.a.shape[-1], self.rank)

  def delta(self, weight: types.Tree) -> jax.Array:
    """W0 * (A B), `[i, o]` float32."""
    w = jax.lax.stop_gradient(quant.dequantize(weight, jnp.float32))
    return w * jnp.matmul(self._columns(), self.b, precision="highest")

  def apply(self, x, weight, noise=None):
    # Not x (W0 * (1 + A B)): in 16 bits 1 + A B is 1 for small A B.
    y = quant.matmul(x, weight)
    if noise is not None:
      x = noise.dropout(x, self.rate)
    return y + pieces.dense(x, HiRA.delta, self, weight)

  def lookup(self, tokens, table):
    low = jnp.take(self._columns(), tokens, axis=0)
    return jnp.take(table, tokens, axis=0) * (1.0 + low @ self.b)

  def merge(self, weight):
    return quant.dequantize(weight, jnp.float32) + self.delta(weight)

  def size(self) -> int:
    return int(self.rank.sum()) * (self.a.shape[-2] + self.b.shape[-1])

  def to_peft(self, embedding: bool = False) -> dict[str, types.Array]:
    r, name = int(self.rank), "hira_embedding_" if embedding else "hira_"
    return {f"{name}A": self.a[:, :r].T, f"{name}B": self.b[:r].T}

  @classmethod
  def from_peft(cls, tensors, slot):
    name = "hira_embedding_" if slot.embedding else "hira_"
    return cls(a=pieces.widened(tensors[f"{name}A"].T, 1, slot.width),
               b=pieces.widened(tensors[f"{name}B"].T, 0, slot.width),
               **slot.values("rate", "rank"))

  @classmethod
  def peft_rank(cls, tensors):
    name = "hira_embedding_A"
    return tensors[name if name in tensors else "hira_A"].shape[0]


def init(key, weight, slot, shared=None):
  """The adapter of one module before the first step."""
  del shared
  draw = starts.embedding if slot.embedding else slot.start.draw
  i, o = weight.shape[-2:]
  a, b = draw(key, i, o, slot.width, slot.rank)
  return HiRA(a=a, b=b, **slot.values("rate", "rank"))


def _config(config: config_lib.AdapterConfig) -> dict[str, Any]:
  return {
      "r": config.rank, "hira_dropout": float(config.dropout),
      "fan_in_fan_out": False, "rank_pattern": {},
      "init_weights": True if config.init == "default" else config.init}


def _block(config: Mapping[str, Any]) -> dict[str, Any]:
  return {"rank": int(config["r"]),
          "dropout": float(config.get("hira_dropout") or 0.0)}


METHOD = method.Method(
    summary="h = x W0 + x (W0 * (A B))", paper="openreview TwJrTz9cRS",
    adapter=HiRA, init=init, count="r * (i + o)", embeddings=True,
    # No patterns: PEFT has the option and makes all ranks r nevertheless, so
    # that it could not read others.
    zero_gradients=("a",), starts=("gaussian",),
    form=method.Form(
        peft_type="HIRA", config=_config, block=_block,
        neutral={"fan_in_fan_out": (False,)}))
