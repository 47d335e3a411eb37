"""KaSA: knowledge-aware singular values (Wang et al. 2024, arXiv 2412.06071).

  h = (x - x U U^T) W0 + s dropout(x) A diag(D) B        s = alpha / r

where U `[i, r]` are the left singular vectors of the r smallest singular
values of W0 `[i, o]`: what they stand for is taken to be noise, and is taken
out of W0 (eq. 5). A and B = 0 are LoRA's, D `[r]` ~ N(0, 1). Beside the loss,
with I the identity, over all matrices (eq. 9 to 11),

  sum beta |D|^2 + gamma (||A^T A - I|| + ||B B^T - I||)

The base stays as it is: of a quantised weight, U is of what it stands for.

Trainable parameters: r (i + o) + r a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import errors
from lora_jax import quant
from lora_jax import struct
from lora_jax import types
from lora_jax.adapters import base
from lora_jax.adapters import config as config_lib
from lora_jax.adapters import lora
from lora_jax.adapters import method
from lora_jax.adapters import orthogonal


@dataclasses.dataclass(frozen=True)
class Options:
  """Attributes:

    beta: weight of D's squares in the loss.
    gamma: weight of the distances of A and B from orthogonal.
  """

  beta: float = 1e-4
  gamma: float = 1e-3


@functools.cache
def smallest(width: int) -> Callable[..., jax.Array]:
  """From a weight `[i, o]` to its last `width` left singular vectors."""

  def vectors(weight, shared=None):
    del shared
    u, _, _ = jnp.linalg.svd(
        quant.dequantize(weight, jnp.float32), full_matrices=False)
    return u[:, -width:]

  return vectors


@struct.dataclass
class KaSA(lora.LoRA):
  """LoRA's fields, and:

    d: `[r]`, the singular values of the change.
    u: `[i, r]`, U (`base.beside`); without it, it is found in the weight.
  """

  pads: ClassVar[bool] = False  # Padding comes first in U.

  d: types.Array = base.trained(None, default=None)
  u: types.Array | None = base.frozen("in", None, default=None)

  @property
  def constants(self) -> Mapping[str, Callable]:  # type: ignore[override]
    return {"u": smallest(self.a.shape[-1])}

  def noise_of(self, weight: types.Tree) -> jax.Array:
    """U `[i, r]`, zero where this layer has less than r."""
    width = self.a.shape[-1]
    u = smallest(width)(weight) if self.u is None else self.u
    return u * (jnp.arange(width) >= width - self.rank)

  def down_up(self, x):
    h = x @ self.a.astype(x.dtype)
    return (h * (self.scale * self.d).astype(x.dtype)) @ self.b.astype(x.dtype)

  def factors(self):
    return None  # The base's product is of another input.

  def apply(self, x, weight, noise=None):
    u = self.noise_of(weight).astype(x.dtype)
    y = quant.matmul(x - (x @ u) @ u.T, weight)
    if noise is not None:
      x = noise.dropout(x, self.rate)
    return y + self.down_up(x)

  def delta(self):
    return jnp.matmul(self.a, (self.scale * self.d)[:, None] * self.b,
                      precision="highest")

  def merge(self, weight):
    w, u = quant.dequantize(weight, jnp.float32), self.noise_of(weight)
    low = jnp.matmul(u.T, w, precision="highest")
    return w - jnp.matmul(u, low, precision="highest") + self.delta()

  def size(self) -> int:
    return super().size() + int(self.rank.sum())

  def inert(self):
    return dataclasses.replace(super().inert(), d=0 * self.d)

  def to_peft(self, embedding=False):
    return super().to_peft(embedding) | {"lora_diag": self.d[:int(self.rank)]}

  @classmethod
  def from_peft(cls, tensors, slot):
    plain = lora.LoRA.from_peft(tensors, slot)
    d = jnp.asarray(tensors["lora_diag"], jnp.float32)
    return cls(a=plain.a, b=plain.b, d=jnp.pad(
        d, (0, slot.width - d.shape[0])), **slot.values())


def init(key, weight, slot, shared=None):
  """The adapter of one module before the first step."""
  i, o = weight.shape[-2:]
  if slot.width >= min(i, o):
    raise errors.UsageError(
        f"adapter.rank={slot.width} leaves nothing of {slot.target}, a weight "
        f"of {i} x {o}, which KaSA takes as many singular values from; lower "
        "it")
  if slot.given is not None:
    raise errors.UsageError(
        "adapter.init takes A and B out of the weight, and KaSA another part; "
        "use adapter.init=default")
  first, second = jax.random.split(key)
  plain = lora.init(first, weight, slot, shared)
  drawn = jax.random.normal(second, (slot.width,))
  return KaSA(
      a=plain.a, b=plain.b, u=smallest(slot.width)(weight),
      d=jnp.where(jnp.arange(slot.width) < slot.rank, drawn, 0.0),
      **slot.values())


@dataclasses.dataclass(frozen=True)
class Regularisation(method.Rule):
  """Attributes:

    options: `Options`.
    ranks: `((part, target), ranks of its layers)` of all KaSA adapters.
  """

  options: Options
  ranks: tuple[tuple[tuple[str, str], tuple[int, ...]], ...] = ()

  def bound(self, adapters):
    return dataclasses.replace(self, ranks=tuple(
        ((part, name), tuple(np.atleast_1d(adapter.rank).tolist()))
        for part in ("layers", "outer")
        for name, adapter in getattr(adapters, part).items()
        if isinstance(adapter, KaSA)))

  def penalty(self, params):
    total = jnp.float32(0)
    for (part, name), ranks in self.ranks:
      adapter = getattr(params, part)[name]
      used = np.arange(adapter.d.shape[-1]) < np.asarray(ranks)[:, None]
      used = used.reshape(adapter.d.shape)
      total += self.options.beta * jnp.sum(jnp.square(adapter.d))
      for factor in (adapter.a, jnp.swapaxes(adapter.b, -1, -2)):
        total += self.options.gamma * jnp.sum(
            orthogonal.distance(factor, used))
    return total


def _config(config: config_lib.AdapterConfig) -> dict[str, Any]:
  return lora.peft_config(config) | {
      "kasa_config": dataclasses.asdict(config.options)}


def _block(config: Mapping[str, Any]) -> dict[str, Any]:
  options = config["kasa_config"]
  return lora.block(config) | {
      "options": {k: options[k] for k in ("beta", "gamma") if k in options}}


METHOD = method.Method(
    summary="h = (x - x U U^T) W0 + (alpha/r) x A diag(D) B",
    paper="arXiv 2412.06071", adapter=KaSA, init=init,
    count="r * (i + o + 1)", options=Options, patterns=True,
    identity_at_init=False, zero_gradients=("a", "d"),
    rule=lambda config, steps: Regularisation(config.options),
    form=method.Form(
        peft_type="LORA", config=_config, block=_block,
        requires={"kasa_config": True}, neutral=lora.neutral("kasa_config")))
