"""LoHa: low-rank Hadamard products (Hyeon-Woo et al. 2021, 2108.06098).

  h = x W0 + s x ((A1 B1) * (A2 B2))        s = alpha / r

FedPara's product of two low-rank matrices, as LyCORIS (arXiv 2309.14859) adds
it to a frozen W0 `[i, o]`: its rank is up to r^2. A1, A2 are `[i, r]` and B1,
B2 `[r, o]`; A1 ~ U(+-1/sqrt(i)), B1 and B2 ~ U(+-1/sqrt(r)), A2 = 0, so that
h = x W0 at init.

The Hadamard product is one product of r^2 columns and rows: column (p, q) is
a1_p * a2_q, row (p, q) is b1_p * b2_q. Where that is less work than a matrix
`[i, o]`, none is made.

Dropout leaves whole outputs as they are; see `lycoris.dropped`.

Trainable parameters: 2 r (i + o) a matrix.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from lora_jax import errors
from lora_jax import quant
from lora_jax import struct
from lora_jax import types
from lora_jax.adapters import additive
from lora_jax.adapters import base
from lora_jax.adapters import lycoris
from lora_jax.adapters import method
from lora_jax.adapters import pieces


@dataclasses.dataclass(frozen=True)
class Options:
  """Attributes:

    module_dropout: rate of steps in which a matrix stays as it is.
  """

  module_dropout: float = 0.0

  def validate(self) -> None:
    """Raises a `UsageError` if a value is out of range."""
    if not 0.0 <= self.module_dropout < 1.0:
      raise errors.UsageError(
          f"adapter.options.module_dropout={self.module_dropout} is out of "
          "range; use a rate in [0, 1)")


@struct.dataclass
class LoHa(additive.Additive):
  """Attributes (a leading `l` axis when stacked):

    a1, a2: `[i, r]`.
    b1, b2: `[r, o]`.
    scale: `[]`, s.
    rate: `[]`, rate of dropout of outputs.
    rank: `[]` int32, 0: not adapted; what is wider is not used.
    module_rate: of `Options.module_dropout`.
  """

  a1: types.Array = base.trained("in", None)
  b1: types.Array = base.trained(None, "out")
  a2: types.Array = base.up("in", None)
  b2: types.Array = base.trained(None, "out")
  scale: types.Array = base.frozen()
  rate: types.Array = base.frozen()
  rank: types.Array = base.frozen()
  module_rate: float = base.static(default=0.0)

  def _columns(self):
    """A1 and A2 without the padding, which B1 and B2 then meet zeros in."""
    used = pieces.used(self.a1.shape[-1], self.rank)
    return self.a1 * used, self.a2 * used

  def factors(self):
    (i, r), o = self.a1.shape, self.b1.shape[1]
    if r * r * (i + o) > i * o:
      return None
    a1, a2 = self._columns()
    a = (a1[:, :, None] * a2[:, None]).reshape(i, r * r)
    b = (self.b1[:, None] * self.b2[None]).reshape(r * r, o)
    return a, self.scale * b

  def delta(self) -> jax.Array:
    """s (A1 B1) * (A2 B2), `[i, o]` float32."""
    a1, a2 = self._columns()
    left = jnp.matmul(a1, self.b1, precision="highest")
    return self.scale * left * jnp.matmul(a2, self.b2, precision="highest")

  def down_up(self, x):
    factors = self.factors()
    if factors is None:
      return pieces.dense(x, LoHa.delta, self)
    a, b = (f.astype(x.dtype) for f in factors)
    return (x @ a) @ b

  def apply(self, x, weight, noise=None):
    added = self.down_up(x)
    if noise is not None:
      added = lycoris.dropped(
          added, noise, self.rate, self.module_rate, rescaled=True)
    return quant.matmul(x, weight) + added

  def size(self) -> int:
    i, o = self.a1.shape[-2], self.b1.shape[-1]
    return 2 * int(self.rank.sum()) * (i + o)

  def to_peft(self, embedding=False):
    r = int(self.rank)
    return {
        "hada_w1_a": self.b1[:r].T, "hada_w1_b": self.a1[:, :r].T,
        "hada_w2_a": self.b2[:r].T, "hada_w2_b": self.a2[:, :r].T}

  @classmethod
  def from_peft(cls, tensors, slot):
    a1, a2, b1, b2 = (
        pieces.widened(tensors[f"hada_{name}"].T, axis, slot.width)
        for name, axis in (("w1_b", 1), ("w2_b", 1), ("w1_a", 0), ("w2_a", 0)))
    return cls(a1=a1, b1=b1, a2=a2, b2=b2, **slot.values(),
               module_rate=slot.options.module_dropout)

  @classmethod
  def peft_rank(cls, tensors):
    return tensors["hada_w1_b"].shape[0]


def init(key, weight, slot, shared=None):
  """The adapter of one module before the first step."""
  del shared
  (i, o), r = weight.shape[-2:], slot.width
  keys = jax.random.split(key, 3)
  return LoHa(
      a1=pieces.uniform(keys[0], (i, r), i),
      b1=pieces.uniform(keys[1], (r, o), slot.rank),
      a2=jnp.zeros((i, r), jnp.float32),
      b2=pieces.uniform(keys[2], (r, o), slot.rank),
      module_rate=slot.options.module_dropout, **slot.values())


METHOD = method.Method(
    summary="h = x W0 + (alpha/r) x ((A1 B1) * (A2 B2))",
    paper="arXiv 2108.06098", adapter=LoHa, init=init,
    count="2 * r * (i + o)", options=Options, patterns=True,
    zero_gradients=("a1", "b1", "b2"),
    form=method.Form(
        peft_type="LOHA", config=lycoris.peft_config, block=lycoris.block))
