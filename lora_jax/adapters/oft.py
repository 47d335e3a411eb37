"""OFT: orthogonal fine-tuning (Qiu et al. 2023, 2306.07280; v2, 2506.19847).

  h = (x R) W0 + bias,  R = blockdiag(R_1, ..., R_n) orthogonal `[i, i]`

Each R_j `[b, b]` is the Cayley transform of a skew-symmetric Q_j, whose upper
triangle is trained and starts at 0, so that R = I. By default (as in PEFT) it
is a Neumann series of `terms` terms, nearly orthogonal and without a solve:

  R = I + 2 Q + 2 Q^2 + ... + Q^(terms - 1),   else R = (I - Q) (I + Q)^-1

(the two have opposite signs of Q, in PEFT too). Constrained OFT keeps the norm
of each Q_j within eps / sqrt(n), by a projection after each step of training;
the gradient does not see it. No matrix `[i, i]` is made. There is no dropout:
PEFT's `module_dropout` is applied nowhere, either.

Trainable parameters: n b (b - 1) / 2 a matrix, n = i / b, or 1 if shared.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_jax import errors
from lora_jax import quant
from lora_jax import struct
from lora_jax import types
from lora_jax.adapters import base
from lora_jax.adapters import config as config_lib
from lora_jax.adapters import method


@dataclasses.dataclass(frozen=True)
class Options:
  """Attributes:

    block_size: b; the nearest divisor of i where it is none. 0: by `blocks`.
    blocks: n, if block_size is 0.
    share: whether all blocks are one.
    neumann: whether R is the series.
    terms: of the series.
    coft: whether it is constrained.
    eps: see above.
  """

  block_size: int = 32
  blocks: int = 0
  share: bool = False
  neumann: bool = True
  terms: int = 5
  coft: bool = False
  eps: float = 6e-5

  def validate(self) -> None:
    """Raises a `UsageError` if a value is out of range."""
    if (self.block_size > 0) == (self.blocks > 0):
      raise errors.UsageError(
          f"adapter.options: block_size={self.block_size} and blocks="
          f"{self.blocks}; give one of them, and 0 for the other")
    if self.terms < 2:
      raise errors.UsageError(
          f"adapter.options.terms={self.terms} is out of range; use 2 or more")

  def block(self, i: int) -> int:
    """b of a matrix with i inputs."""
    if self.block_size:
      return _divisor(i, self.block_size)
    return i // _divisor(i, self.blocks)

  def parameters(self, i: int) -> int:
    """Trained, of one matrix."""
    b = self.block(i)
    return (1 if self.share else i // b) * b * (b - 1) // 2


def _divisor(size: int, wanted: int) -> int:
  """The divisor of `size` nearest to `wanted`; the lower of two."""
  if wanted >= size:
    return size
  return min((d for d in range(1, size + 1) if size % d == 0),
             key=lambda d: (abs(d - wanted), d))


@struct.dataclass
class OFT(base.Adapter):
  """Attributes:

    q: `[n, b (b - 1) / 2]`, the upper triangles, row by row.
    rank: `[]` int32, 0: not adapted.
    rows: i; static, as what follows.
    options: the method's.
  """

  q: types.Array = base.trained(None, None)
  rank: types.Array = base.frozen()
  rows: int = base.static(default=0)
  options: Options = base.static(default=Options())

  def rotations(self) -> jax.Array:
    """R_1, ..., R_n `[n, b, b]` float32."""
    b = self.options.block(self.rows)
    q = self.active(self.q, 0.0)
    if self.options.coft:
      q = q + jax.lax.stop_gradient(shortened(q, self.options.eps) - q)
    skew = skew_symmetric(q, b)
    found = (neumann(skew, self.options.terms) if self.options.neumann
             else cayley(skew))
    return jnp.broadcast_to(found, (self.rows // b, b, b))

  def rotated(self, x: types.Array) -> jax.Array:
    """x R `[..., i]`, in x's dtype."""
    r = self.rotations().astype(x.dtype)
    blocks = x.reshape(*x.shape[:-1], r.shape[0], r.shape[1])
    return jnp.einsum("...nb,nbc->...nc", blocks, r).reshape(x.shape)

  def apply(self, x, weight, noise=None):
    del noise
    return quant.matmul(self.rotated(x), weight)

  def merge(self, weight):
    w, r = quant.dequantize(weight, jnp.float32), self.rotations()
    blocks = w.reshape(r.shape[0], r.shape[1], -1)
    return jnp.einsum(
        "nbc,nco->nbo", r, blocks, precision="highest").reshape(w.shape)

  def to_peft(self, embedding=False):
    return {"oft_R.weight": self.q}

  @classmethod
  def from_peft(cls, tensors, slot):
    return cls(q=jnp.asarray(tensors["oft_R.weight"], jnp.float32),
               rank=slot.rank, rows=slot.shape[0], options=slot.options)


@dataclasses.dataclass(frozen=True)
class Constraint(method.Rule):
  """Projects every constrained OFT after a step."""

  def wrap(self, inner):
    inner = optax.with_extra_args_support(inner)

    def update(updates, state, params=None, **extra):
      updates, state = inner.update(updates, state, params, **extra)

      def within(change, old):
        if not isinstance(change, OFT) or not change.options.coft:
          return change
        q = shortened(old.q + change.q, change.options.eps)
        return dataclasses.replace(change, q=q - old.q)

      return jax.tree.map(
          within, updates, params,
          is_leaf=lambda node: isinstance(node, OFT)), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def rule(config: config_lib.AdapterConfig, steps: int) -> method.Rule | None:
  """What this adds to training."""
  del steps
  return Constraint() if config.options.coft else None


def skew_symmetric(upper: types.Array, b: int) -> jax.Array:
  """Q `[n, b, b]` of upper triangles `[n, b (b - 1) / 2]`."""
  i, j = jnp.triu_indices(b, 1)
  found = jnp.zeros((upper.shape[0], b, b)).at[:, i, j].set(upper)
  return found - found.swapaxes(1, 2)


def cayley(skew: types.Array) -> jax.Array:
  """(I - Q) (I + Q)^-1 of skew-symmetric Q `[..., b, b]`."""
  eye = jnp.eye(skew.shape[-1])
  # X (I + Q) = I - Q.
  return jnp.linalg.solve((eye + skew).swapaxes(-1, -2),
                          (eye - skew).swapaxes(-1, -2)).swapaxes(-1, -2)


def neumann(skew: types.Array, terms: int) -> jax.Array:
  """The series for -Q, of as many terms; see above."""
  found = jnp.eye(skew.shape[-1]) + 2 * skew
  power, last = skew, 3 if terms == 3 else terms - 1  # PEFT's 3 are 4.
  for number in range(2, last + 1):
    power = jnp.matmul(power, skew, precision="highest")
    found += power if number == last else 2 * power
  return found


def shortened(q: types.Array, eps: float) -> jax.Array:
  """Upper triangles `[..., n, b (b - 1) / 2]` of which each Q_j has at most
  the norm eps / sqrt(n)."""
  limit = eps / q.shape[-2] ** 0.5
  norm = jnp.sqrt(2 * jnp.sum(jnp.square(q), -1, keepdims=True))
  return q * jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-30))


def init(key, weight, slot, shared=None):
  """The adapter of one module before the first step."""
  del key, shared
  i = weight.shape[-2]
  b = slot.options.block(i)
  n = 1 if slot.options.share else i // b
  return OFT(q=jnp.zeros((n, b * (b - 1) // 2), jnp.float32), rank=slot.rank,
             rows=i, options=slot.options)


def _config(config: config_lib.AdapterConfig) -> dict[str, Any]:
  o = config.options
  return {
      "r": o.blocks, "oft_block_size": o.block_size, "block_share": o.share,
      "use_cayley_neumann": o.neumann, "num_cayley_neumann_terms": o.terms,
      "coft": o.coft, "eps": o.eps, "module_dropout": 0.0, "bias": "none",
      "fan_in_fan_out": False, "init_weights": True}


def _block(config: Mapping[str, Any]) -> dict[str, Any]:
  names = {"blocks": "r", "block_size": "oft_block_size",
           "share": "block_share", "neumann": "use_cayley_neumann",
           "terms": "num_cayley_neumann_terms", "coft": "coft", "eps": "eps"}
  return {"options": {ours: config[theirs] for ours, theirs in names.items()
                      if theirs in config}}


METHOD = method.Method(
    summary="h = (x R) W0, R block-diagonal and orthogonal",
    paper="arXiv 2306.07280", adapter=OFT, init=init,
    count="options.parameters(i)", options=Options, ranked=False,
    rule=rule, tiny={"options": {"block_size": 8}},
    form=method.Form(
        peft_type="OFT", config=_config, block=_block, neutral={
            "bias": ("none",), "fan_in_fan_out": (False,)}))
