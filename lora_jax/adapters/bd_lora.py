"""BD-LoRA: LoRA with one factor block-diagonal (Hugging Face PEFT's).

  h = x W0 + s dropout(x) A B        s = alpha / r

with A = diag(A_1 ... A_n), A_k `[i/n, r/n]`, where a served model's weight is
cut along its inputs (o_proj, down_proj), and B = diag(B_1 ... B_n), B_k
`[r/n, o/n]`, where it is cut along its outputs: each of n devices then has a
block, and what they exchange for the base's product is enough. A block of A
is ~ U(-sqrt(6 n / i), sqrt(6 n / i)); a whole A and B = 0 are LoRA's.

Trainable parameters: r (i/n + o) or r (i + o/n) a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lora_jax import errors
from lora_jax import struct
from lora_jax.adapters import base
from lora_jax.adapters import config as config_lib
from lora_jax.adapters import lora
from lora_jax.adapters import method
from lora_jax.adapters import targets


@dataclasses.dataclass(frozen=True)
class Options:
  """Attributes:

    nblocks: n.
    blocked_a: targets with a block-diagonal A.
    blocked_b: targets with a block-diagonal B; others are plain LoRA's.
  """

  nblocks: int = 2
  blocked_a: tuple[str, ...] = ("o_proj", "down_proj")
  blocked_b: tuple[str, ...] = (
      "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")

  def validate(self) -> None:
    """Raises `errors.UsageError` on a bad value."""
    if self.nblocks < 1:
      raise errors.UsageError(
          f"adapter.options.nblocks={self.nblocks} is out of range; use an "
          "integer of at least 1")
    both = sorted({*self.blocked_a} & {*self.blocked_b})
    if both:
      raise errors.UsageError(
          f'adapter.options.blocked_a and blocked_b both have "{both[0]}"; '
          "take it out of one of them")

  def blocks(self, target: str) -> tuple[int, int]:
    """(of A, of B)."""
    return (self.nblocks if target in self.blocked_a else 1,
            self.nblocks if target in self.blocked_b else 1)


@struct.dataclass
class BDLoRA(lora.LoRA):
  """LoRA's fields, where blocks lie side by side:

    a: `[i, r/n]`, block k the rows from k i/n on, or `[i, r]`.
    b: `[r/n, o]`, block k the columns from k o/n on, or `[r, o]`.
    n: (blocks of A, blocks of B).
  """

  pads: ClassVar[bool] = False  # Blocks would move.

  n: tuple[int, int] = base.static(default=(1, 1))

  def dense(self) -> tuple[jax.Array, jax.Array]:
    """A `[i, r]` and B `[r, o]` with their zeros."""
    a = _diagonal(self.a, self.n[0])
    return a, _diagonal(self.b.T, self.n[1]).T

  def down_up(self, x):
    a, b = self.dense()
    h = x @ a.astype(x.dtype)
    return (h * self.scale.astype(x.dtype)) @ b.astype(x.dtype)

  def factors(self):
    a, b = self.dense()
    return a, self.scale * b

  def delta(self):
    return self.scale * jnp.matmul(*self.dense(), precision="highest")

  def size(self) -> int:
    (i, _), (_, o) = self.a.shape[-2:], self.b.shape[-2:]
    r = int(self.rank.sum())
    return r * i // self.n[0] + r * o // self.n[1]

  def to_peft(self, embedding=False):
    (i, part), n = self.a.shape, self.n[0]
    a = jnp.swapaxes(self.a.reshape(n, i // n, part), 1, 2)
    return {"lora_A.weight": a.reshape(n * part, i // n),
            "lora_B.weight": self.b.T}

  @classmethod
  def from_peft(cls, tensors, slot):
    if slot.rank != slot.width:
      raise errors.UserError(
          f"{slot.target} has rank {slot.width} in one layer and {slot.rank} "
          "in another, which is not supported for BD-LoRA; merge the adapter "
          "with PEFT and use the merged model")
    blocks = slot.options.blocks(slot.target)
    a, b = (jnp.asarray(tensors[f"lora_{x}.weight"], jnp.float32)
            for x in "AB")
    (r, part), n = a.shape, blocks[0]
    a = jnp.swapaxes(a.reshape(n, r // n, part), 1, 2)
    return cls(a=a.reshape(n * part, r // n), b=b.T, n=blocks,
               **slot.values())


def _diagonal(x, n):
  """`[i, n r]` with n blocks `[i/n, r]` of x `[i, r]` on its diagonal."""
  i, r = x.shape
  own = jnp.arange(i)[:, None] // (i // n) == jnp.arange(n)
  return (x[:, None] * own[..., None].astype(x.dtype)).reshape(i, n * r)


def init(key, weight, slot, shared=None):
  """The adapter of one module before the first step."""
  i, o = weight.shape[-2:]
  blocks = slot.options.blocks(slot.target)
  for n, size in zip(blocks, (i, o), strict=True):
    if size % n or slot.width % n:
      raise errors.UsageError(
          f"adapter.options.nblocks={n} does not divide adapter.rank="
          f"{slot.width} and the {size} features of {slot.target}; use "
          "another")
  if slot.given is not None:
    raise errors.UsageError(
        "adapter.init takes whole factors out of the weight; use "
        "adapter.init=default")
  plain = lora.init(key, weight, slot, shared)
  a, b = plain.a, plain.b[:slot.width // blocks[1]]
  if blocks[0] > 1:
    bound = (6 * blocks[0] / i) ** 0.5
    a = jax.random.uniform(
        key, (i, slot.width // blocks[0]), jnp.float32, -bound, bound)
    a = jnp.where(slot.rank > 0, a, 0.0)
  return BDLoRA(a=a, b=b, n=blocks, **slot.values())


def _config(config: config_lib.AdapterConfig) -> dict[str, Any]:
  options = config.options
  return lora.peft_config(config) | {"use_bdlora": {
      "target_modules_bd_a": sorted(options.blocked_a),
      "target_modules_bd_b": sorted(options.blocked_b),
      "nblocks": options.nblocks, "match_strict": False}}


def _block(config: Mapping[str, Any]) -> dict[str, Any]:
  options = config["use_bdlora"]

  def named(patterns):
    # PEFT looks for them anywhere in a module's path.
    return tuple(
        name for part, names in (("self_attn", targets.ATTENTION),
                                 ("mlp", targets.MLP), ("", ("lm_head",)))
        for name in names
        if any(p in f"{part}.{name}" for p in patterns or ()))

  return lora.block(config) | {"options": {
      "nblocks": options.get("nblocks", 1),
      "blocked_a": named(options.get("target_modules_bd_a")),
      "blocked_b": named(options.get("target_modules_bd_b"))}}


METHOD = method.Method(
    summary="h = x W0 + (alpha/r) x A B, A or B block-diagonal",
    paper="PEFT's use_bdlora", adapter=BDLoRA, init=init, options=Options,
    count="r * i // (nblocks if target in blocked_a else 1)"
    " + r * o // (nblocks if target in blocked_b else 1)",
    zero_gradients=("a",), form=method.Form(
        peft_type="LORA", config=_config, block=_block,
        requires={"use_bdlora": True}, neutral=lora.neutral("use_bdlora")))
