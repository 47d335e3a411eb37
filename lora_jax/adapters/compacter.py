"""Compacter (Mahabadi et al. 2021, arXiv 2106.04647): small bottlenecks.

  y' = y + act(y D + c) U + u
  D = sum_i A_i (x) s_i t_i   `[d, r]`, U likewise `[r, d]`

with y `[b, t, d]` a block's output, (x) the Kronecker product, m rules A_i
`[m, m]` ~ N(0, 0.01^2) that all layers and both projections share (m =
`divisor`, the paper's n), and s_i `[d/m, 1]`, t_i `[1, r/m]` of each
projection (1: `phm_rank`). s and t start Glorot-uniform, t of U and the biases
at zero, so that y' = y at init.

  compacter       after attention and MLP
  compacter_plus  after the MLP only (Compacter++)

Trainable parameters: 2 (d + r) + r + d a block (phm_rank 1), and m^3.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from lora_jax import errors
from lora_jax import struct
from lora_jax import types
from lora_jax.adapters import base
from lora_jax.adapters import bottleneck
from lora_jax.adapters import method


@dataclasses.dataclass(frozen=True)
class Options:
  """Attributes:

    activation: a key of `bottleneck.ACTIVATIONS`.
    divisor: m; d and r are multiples of it.
    phm_rank: of each s_i t_i.
  """

  activation: str = "gelu"
  divisor: int = 4
  phm_rank: int = 1

  def validate(self) -> None:
    errors.choose("adapter.options.activation", self.activation,
                  bottleneck.ACTIVATIONS)
    for name in ("divisor", "phm_rank"):
      if not 1 <= getattr(self, name) <= 256:
        raise errors.UsageError(
            f"adapter.options.{name}={getattr(self, name)} is out of range; "
            "use an integer from 1 to 256")


@struct.dataclass
class Rules(base.Adapter):
  """What all layers share.

  Attributes:
    rules: A `[m, m, m]`.
  """

  rules: types.Array = base.trained(None, None, None)


@struct.dataclass
class Compacter(base.Adapter):
  """Attributes:

    down_s, down_t: s `[m, d/m, phm_rank]`, t `[m, phm_rank, r/m]` of D.
    up_s, up_t: `[m, r/m, phm_rank]`, `[m, phm_rank, d/m]` of U.
    down_bias, up_bias: `[r]`, `[d]`.
    rate: `[]`, dropout rate on what enters.
    rank: `[]` int32, 0: not adapted.
    rules: A, while it is used; see `Adapters.shared`.
    activation: static.
  """

  down_s: types.Array = base.trained(None, None, None)
  down_t: types.Array = base.trained(None, None, None)
  down_bias: types.Array = base.trained(None)
  up_s: types.Array = base.trained(None, None, None)
  up_t: types.Array = base.up(None, None, None)
  up_bias: types.Array = base.up(None)
  rate: types.Array = base.frozen()
  rank: types.Array = base.frozen()
  rules: types.Array = base.frozen(default=None)
  activation: str = base.static(default="gelu")

  def bound(self, shared):
    return dataclasses.replace(self, rules=shared.rules)

  def residual(self, x, y, noise=None):
    del x
    inner = y if noise is None else noise.dropout(y, self.rate)
    h = product(inner, self.rules, self.down_s, self.down_t)
    h = bottleneck.ACTIVATIONS[self.activation](
        h + self.down_bias.astype(h.dtype))
    out = product(h, self.rules, self.up_s, self.up_t)
    return y + self.active(1.0, 0.0).astype(y.dtype) * (
        out + self.up_bias.astype(y.dtype))

  @classmethod
  def from_peft(cls, tensors, slot):
    return dataclasses.replace(
        super().from_peft(tensors, slot), activation=slot.options.activation)


def product(
    x: types.Array, rules: types.Array, s: types.Array, t: types.Array
) -> jax.Array:
  """x (sum_i A_i (x) s_i t_i) `[..., o]`, without making the matrix.

  Args:
    x: `[..., i]`.
    rules: A `[m, m, m]`.
    s: `[m, i/m, r]`.
    t: `[m, r, o/m]`.
  """
  m, dtype = rules.shape[0], x.dtype
  parts = x.reshape(*x.shape[:-1], m, -1)
  # m: which product; a and c: blocks of the input and of the output.
  within = jnp.einsum("...ap,mpr->...amr", parts, s.astype(dtype))
  across = jnp.einsum("...amr,mac->...cmr", within, rules.astype(dtype))
  out = jnp.einsum("...cmr,mrq->...cq", across, t.astype(dtype))
  return out.reshape(*x.shape[:-1], -1)


def share(key, modules):
  """The rules before the first step."""
  m = modules.options.divisor
  return Rules(rules=0.01 * jax.random.normal(key, (m, m, m)))


def init(key, weight, slot, shared=None):
  """The adapter of one block before the first step.

  Raises:
    errors.UsageError: if d or r cannot be divided.
  """
  del weight, shared
  m, k = slot.options.divisor, slot.options.phm_rank
  d, r = slot.geometry.d, slot.width
  for name, size in (("adapter.rank", r), ("the model's width", d)):
    if size % m:
      raise errors.UsageError(
          f"{name}={size} is not a multiple of adapter.options.divisor={m}; "
          "choose another divisor or rank")
  first, second, third = jax.random.split(key, 3)

  def draw(key, *shape):
    bound = (6 / (shape[1] + shape[2])) ** 0.5
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

  return Compacter(
      down_s=draw(first, m, d // m, k), down_t=draw(second, m, k, r // m),
      down_bias=jnp.zeros(r), up_s=draw(third, m, r // m, k),
      up_t=jnp.zeros((m, k, d // m)), up_bias=jnp.zeros(d),
      activation=slot.options.activation, **slot.values("rate", "rank"))


def _method(summary, targets):
  return method.Method(
      summary=summary, paper="arXiv 2106.04647", adapter=Compacter, init=init,
      count="2 * phm_rank * (d + r) + r + d", count_shared="divisor ** 3",
      options=Options, targets=targets, sites=("self_attn", "mlp"),
      mergeable=False, share=share, zero_gradients=(
          "down_s", "down_t", "down_bias", "up_s", "rules"))


METHOD = _method(
    "y' = y + act(y D) U, D = sum A_i (x) s_i t_i, after attention and MLP",
    "self_attn,mlp")
PLUS = _method(
    "y' = y + act(y D) U, D = sum A_i (x) s_i t_i, after the MLP", "mlp")
