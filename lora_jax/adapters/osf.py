"""OSF: fine-tuning beside the leading subspace (Nayak et al., 2504.07097).

  W0' = U_high S_high V_high + U0 S0 V0      W0' `[o, i]`, its SVD
  h = x W0 + x (U S V - U0 S0 V0)'

The `effective_rank` leading directions of W0 are kept; the k others, U `[o,
k]`, S `[k]` and V `[k, i]`, are trained from where they are, so that h = x W0
at init. Gradients of U and V are made orthogonal to U_high and V_high. What the
weight tells (U0, S0, V0, and the one of U_high and V_high that is no orthogonal
complement of them) is in no file: it is taken from the base that the adapter
stands beside. Signs of its SVD do not matter.

Trainable parameters: k (i + o + 1) a matrix, about half of W0's at k = i / 2.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import errors
from lora_jax import quant
from lora_jax import struct
from lora_jax import types
from lora_jax.adapters import base
from lora_jax.adapters import config as config_lib
from lora_jax.adapters import method

# Of the weight alone.
KNOWN = ("u0", "s0", "v0", "u_high", "v_high")


@dataclasses.dataclass(frozen=True)
class Options:
  """Attributes:

    effective_rank: directions that are kept; below 1, a share of min(i, o).
  """

  effective_rank: float = 0.5

  def validate(self) -> None:
    """Raises a `UsageError` if a value is out of range."""
    rank = self.effective_rank
    if not rank > 0 or (rank >= 1 and rank != int(rank)):
      raise errors.UsageError(
          f"adapter.options.effective_rank={rank} is out of range; use a share "
          "below 1, or a whole number of directions")

  def trained(self, i: int, o: int) -> int:
    """k.

    Raises:
      errors.UsageError: if nothing is kept or nothing is trained.
    """
    least, rank = min(i, o), self.effective_rank
    high = int(least * rank) if rank < 1 else int(rank)
    if not 0 < high < least:
      raise errors.UsageError(
          f"adapter.options.effective_rank={rank} keeps {high} of {least} "
          f"directions of a {i} x {o} weight; keep at least one, and leave one")
    return least - high


@dataclasses.dataclass(frozen=True)
class Decomposition:
  """From a weight `[i, o]` to `KNOWN`, for k."""

  k: int

  def __call__(self, weight: types.Tree, shared: types.Tree = None) -> tuple:
    del shared
    w = quant.dequantize(weight, jnp.float32).T
    u, s, v = jnp.linalg.svd(w, full_matrices=False)
    high, (o, i) = s.shape[0] - self.k, w.shape
    return (u[:, high:], s[high:], v[high:],
            u[:, :high] if o > i else None, v[:high] if i > o else None)


@jax.custom_vjp
def _beside(x, own, high):
  """x `[n, k]`, whose gradient is made orthogonal to `high` `[n, m]`; None:
  it is brought into the span of `own` `[n, k]`, the complement."""
  del own, high
  return x


def _forward(x, own, high):
  return x, (own, high)


def _backward(known, grad):
  own, high = known
  with jax.default_matmul_precision("highest"):
    if high is None:
      return own @ (own.T @ grad), None, None
    return grad - high @ (high.T @ grad), None, None


_beside.defvjp(_forward, _backward)


def _transposed(x):
  return None if x is None else x.T


@struct.dataclass
class OSF(base.Adapter):
  """Attributes (PEFT's layout):

    u, s, v: `[o, k]`, `[k]` and `[k, i]`.
    rank: `[]` int32, 0: not adapted.
    u0, s0, v0: where they started, once the weight is known.
    u_high, v_high: `[o, m]` and `[m, i]`, m directions that are kept; of a
      square factor None.
  """

  u: types.Array = base.trained("out", None)
  s: types.Array = base.trained(None)
  v: types.Array = base.trained(None, "in")
  rank: types.Array = base.frozen()
  u0: types.Array = base.frozen("out", None, default=None)
  s0: types.Array = base.frozen(None, default=None)
  v0: types.Array = base.frozen(None, "in", default=None)
  u_high: types.Array | None = base.frozen("out", None, default=None)
  v_high: types.Array | None = base.frozen(None, "in", default=None)

  @property
  def constants(self):  # type: ignore[override]
    # What it started from, it keeps, whatever becomes of the base.
    if self.u0 is not None:
      return {}
    return {"known": Decomposition(self.s.shape[-1])}

  def with_constants(self, values):
    known = values.get("known")
    if known is None:
      return self
    return dataclasses.replace(self, **dict(zip(KNOWN, known, strict=True)))

  def beside(self, weight: types.Tree) -> OSF:
    """With what the weight tells."""
    return self.with_constants({
        name: function(jax.lax.stop_gradient(weight))
        for name, function in self.constants.items()})

  def prepared(self, weight, shared=None):
    return self.beside(weight)

  def factors(self):
    if self.u0 is None:
      return None
    u = _beside(self.u, self.u0, self.u_high)
    v = _beside(self.v.T, self.v0.T, _transposed(self.v_high))
    second = jnp.concatenate([(u * self.s).T, -(self.u0 * self.s0).T], 0)
    return (jnp.concatenate([v, self.v0.T], 1), self.active(second, 0.0))

  def down_up(self, x):
    first, second = self.factors()
    return (x @ first.astype(x.dtype)) @ second.astype(x.dtype)

  def apply(self, x, weight, noise=None):
    del noise
    return quant.matmul(x, weight) + self.beside(weight).down_up(x)

  def merge(self, weight):
    return quant.dequantize(weight, jnp.float32) + jnp.matmul(
        *self.beside(weight).factors(), precision="highest")

  def to_peft(self, embedding=False):
    return {f"osf_svd_params.{name.upper()}_low": getattr(self, name)
            for name in "usv"}

  @classmethod
  def from_peft(cls, tensors, slot):
    return cls(rank=slot.rank, **{
        name: jnp.asarray(
            tensors[f"osf_svd_params.{name.upper()}_low"], jnp.float32)
        for name in "usv"})


def init(key, weight, slot, shared=None):
  """The adapter of one module before the first step."""
  del key, shared
  known = Decomposition(slot.options.trained(*weight.shape[-2:]))(weight)
  u, s, v, *_ = known
  return OSF(u=u, s=s, v=v, rank=slot.rank,
             **dict(zip(KNOWN, known, strict=True)))


def _config(config: config_lib.AdapterConfig) -> dict[str, Any]:
  rank = config.options.effective_rank
  return {"effective_rank": rank if rank < 1 else int(rank),
          "rank_pattern": None, "init_weights": True}


def _block(config: Mapping[str, Any]) -> dict[str, Any]:
  rank = config.get("effective_rank")
  if isinstance(rank, float) and rank >= 1:
    raise errors.UsageError(
        f"effective_rank={rank} keeps every direction, and trains none; use a "
        "share below 1, or an integer")
  return {"options": {} if rank is None else {"effective_rank": rank}}


METHOD = method.Method(
    summary="h = x W0 + x (U S V - U0 S0 V0)', of the SVD's last directions",
    paper="arXiv 2504.07097", adapter=OSF, init=init,
    count="(i + o + 1) * options.trained(i, o)", options=Options, ranked=False,
    form=method.Form(
        peft_type="OSF", config=_config, block=_block,
        neutral={"rank_pattern": (None, {})}))
