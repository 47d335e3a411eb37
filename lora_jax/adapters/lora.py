"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv 2106.09685), and rsLoRA.

  h = x W0 + s dropout(x) A B        s = alpha / r   (eq. 3)

with W0 `[i, o]` frozen, A `[i, r]` ~ U(-1/sqrt(i), 1/sqrt(i)) (what
`kaiming_uniform(a=sqrt(5))` gives) and B `[r, o]` = 0, so that h = x W0 at
init. rsLoRA (Kalajdzievski 2023, arXiv 2312.03732) has s = alpha / sqrt(r).
On embeddings the roles are reversed, as in Hugging Face PEFT: A `[v, r]` = 0
and B `[r, d]` ~ N(0, 1).

Trainable parameters: r (i + o) a matrix.

Layers whose rank is smaller than the stack's are padded with zero columns in
A and zero rows in B. Both factors of the padded part are zero, hence so are
their gradients: it needs no mask.
"""

from __future__ import annotations

from typing import ClassVar

from flax import struct
import jax
import jax.numpy as jnp

from lora_jax import quant
from lora_jax import types
from lora_jax.adapters import base


@struct.dataclass
class LoRA(base.Adapter):
  """Attributes (a leading `l` axis when stacked):

    a: `[i, r]`, down projection, float32.
    b: `[r, o]`, up projection, float32.
    scale: `[]`, s.
    rate: `[]`, dropout rate.
    rank: `[]` int32, the rank of this layer (0: not adapted).
  """

  a: types.Array
  b: types.Array = base.up()
  scale: types.Array = base.frozen()
  rate: types.Array = base.frozen()
  rank: types.Array = base.frozen()

  peft_type: ClassVar[str | None] = "LORA"

  def down_up(self, x: types.Array) -> types.Array:
    """s x A B, `[..., o]`, in x's dtype."""
    h = x @ self.a.astype(x.dtype)
    return (h * self.scale.astype(x.dtype)) @ self.b.astype(x.dtype)

  def apply(self, x, weight, noise=None):
    y = quant.matmul(x, weight)
    if noise is not None:
      x = noise.dropout(x, self.rate)
    return y + self.down_up(x)

  def lookup(self, tokens: types.Array, table: types.Array) -> types.Array:
    """Adapted embedding rows, `[..., d]` for `tokens [...]`."""
    low = jnp.take(self.a, tokens, axis=0)
    return jnp.take(table, tokens, axis=0) + (low * self.scale) @ self.b

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


def init(key, weight, width, frozen, embedding=False):
  """(replacement of the base weight: none, adapter) for one module.

  Args:
    key: PRNG key of this layer and target.
    weight: `[i, o]`, array or `quant.QuantizedArray`.
    width: r of the stack; columns from `frozen["rank"]` on are zero.
    frozen: the frozen fields' values.
    embedding: whether the weight is a table, `[v, d]`.
  """
  i, o = weight.shape[-2:]
  used = (jnp.arange(width) < frozen["rank"]).astype(jnp.float32)
  if embedding:
    a = jnp.zeros((i, width), jnp.float32)
    b = jax.random.normal(key, (width, o), jnp.float32) * used[:, None]
  else:
    bound = i ** -0.5
    a = jax.random.uniform(
        key, (i, width), jnp.float32, -bound, bound) * used
    b = jnp.zeros((width, o), jnp.float32)
  return None, LoRA(a=a, b=b, **frozen)
