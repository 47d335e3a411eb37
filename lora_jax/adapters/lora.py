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

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from lora_jax import quant
from lora_jax import struct
from lora_jax import types
from lora_jax.adapters import base
from lora_jax.adapters import starts


@struct.dataclass
class LoRA(base.Adapter):
  """Attributes (a leading `l` axis when stacked):

    a: `[i, r]`, down projection, float32.
    b: `[r, o]`, up projection, float32.
    scale: `[]`, s.
    rate: `[]`, dropout rate.
    rank: `[]` int32, the rank of this layer (0: not adapted).
    a0, b0: where A and B started, if they were taken out of the base.
  """

  a: types.Array = base.trained("in", None)
  b: types.Array = base.up(None, "out")
  scale: types.Array = base.frozen()
  rate: types.Array = base.frozen()
  rank: types.Array = base.frozen()
  a0: types.Array | None = base.frozen("in", None, default=None)
  b0: types.Array | None = base.frozen(None, "out", default=None)

  peft_type: ClassVar[str | None] = "LORA"

  def down_up(self, x: types.Array) -> types.Array:
    """s x A B, `[..., o]`, in x's dtype."""
    h = x @ self.a.astype(x.dtype)
    return (h * self.scale.astype(x.dtype)) @ self.b.astype(x.dtype)

  def factors(self):
    return self.a, self.scale * self.b

  def apply(self, x, weight, noise=None):
    y = quant.matmul(x, weight)
    if noise is not None:
      x = noise.dropout(x, self.rate)
    return y + self.down_up(x)

  def lookup(self, tokens: types.Array, table: types.Array) -> types.Array:
    """Adapted embedding rows, `[..., d]` for `tokens [...]`."""
    low = jnp.take(self.a, tokens, axis=0)
    return jnp.take(table, tokens, axis=0) + (low * self.scale) @ self.b

  def narrowed(self, dtype):
    return dataclasses.replace(
        self, a=self.a.astype(dtype), b=self.b.astype(dtype))

  def delta(self) -> jax.Array:
    """s A B, `[i, o]` float32."""
    return self.scale * jnp.matmul(self.a, self.b, precision="highest")

  def merge(self, weight):
    return quant.dequantize(weight, jnp.float32) + self.delta()

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

  @classmethod
  def from_peft(cls, tensors, width, frozen):
    """Inverse of `to_peft`; `width` is the stack's rank.

    Args:
      tensors: PEFT's tensors of one module, by suffix.
      width: r of the stack, at least the module's own.
      frozen: the values of the frozen fields.
    """
    a = tensors.get("lora_A.weight", tensors.get("lora_embedding_A")).T
    b = tensors.get("lora_B.weight", tensors.get("lora_embedding_B")).T
    pad = width - a.shape[1]
    return cls(
        a=jnp.pad(jnp.asarray(a, jnp.float32), ((0, 0), (0, pad))),
        b=jnp.pad(jnp.asarray(b, jnp.float32), ((0, pad), (0, 0))), **frozen)


def init(key, weight, width, frozen, embedding=False, draw=starts.kaiming,
         given=None):
  """The adapter of one module before the first step.

  Args:
    key: PRNG key of this layer and target.
    weight: `[i, o]`, array or `quant.QuantizedArray`.
    width: r of the stack; columns from `frozen["rank"]` on are zero.
    frozen: the frozen fields' values.
    embedding: whether the weight is a table, `[v, d]`.
    draw: `(key, i, o, width, rank) -> (A, B)`; see `starts`.
    given: (A, B) that were taken out of the weight, instead.
  """
  if given is not None:
    a, b = given
    return LoRA(a=a, b=b, a0=a, b0=b, **frozen)
  draw = starts.embedding if embedding else draw
  a, b = draw(key, *weight.shape[-2:], width, frozen["rank"])
  return LoRA(a=a, b=b, **frozen)
