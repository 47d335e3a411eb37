"""AdaLoRA: ranks that go where they matter (Zhang et al. 2023, 2303.10512).

  h = x W0 + s dropout(x) A diag(E) B        s = alpha / (r + 1e-5)

with W0 `[i, o]` frozen, A `[i, r]` and B `[r, o]` ~ N(0, 0.02^2) and E `[r]` =
0, so that h = x W0 at init. r is the rank before pruning, and s stays. Which
triplets (A[:, j], E[j], B[j]) are kept is decided over all matrices together,
in `allocation`; those that are not have E = 0. Beside the loss, A and B are
kept near orthogonal by

  orth_reg mean(||A^T A - I||, ||B B^T - I||)          (eq. 4)

with Frobenius norms, not squared, averaged over the matrices A and B of the
model as Hugging Face PEFT does.

Trainable parameters: r (i + o + 1) a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import errors
from lora_jax import struct
from lora_jax import types
from lora_jax.adapters import allocation
from lora_jax.adapters import base
from lora_jax.adapters import config as config_lib
from lora_jax.adapters import lora
from lora_jax.adapters import method

# Of A and B at the start.
DEVIATION = 0.02


@dataclasses.dataclass(frozen=True)
class Options:
  """When and how triplets are pruned; `adapter.rank` is the rank at first.

  Attributes:
    target_r: mean rank of a matrix at the end.
    tinit: steps before pruning begins.
    tfinal: steps after it ends.
    delta_t: steps between two prunings.
    beta1: decay of the mean of importances.
    beta2: decay of the mean of their deviations.
    orth_reg: weight of the orthogonality of A and B in the loss.
    init_r: rank before pruning, of an adapter that was read after it; 0 is
      `adapter.rank`.
  """

  target_r: int = 8
  tinit: int = 0
  tfinal: int = 0
  delta_t: int = 1
  beta1: float = 0.85
  beta2: float = 0.85
  orth_reg: float = 0.5
  init_r: int = 0

  def validate(self) -> None:
    """Raises `errors.UsageError` on a bad value."""
    for name, least in {"target_r": 1, "tinit": 0, "tfinal": 0, "delta_t": 1,
                        "orth_reg": 0, "init_r": 0}.items():
      value = getattr(self, name)
      if not value >= least:
        raise errors.UsageError(
            f"adapter.options.{name}={value} is out of range; use a number of "
            f"at least {least}")
    for name in ("beta1", "beta2"):
      value = getattr(self, name)
      if not 0 < value < 1:
        raise errors.UsageError(
            f"adapter.options.{name}={value} is out of range; use a number "
            "between 0 and 1")


@struct.dataclass
class AdaLoRA(lora.LoRA):
  """LoRA's fields, and:

    e: `[r]`, what LoRA's product is scaled by between A and B; 0 is pruned.
  """

  e: types.Array = base.trained(None, default=None)

  def down_up(self, x):
    h = x @ self.a.astype(x.dtype)
    return (h * (self.scale * self.e).astype(x.dtype)) @ self.b.astype(x.dtype)

  def factors(self):
    return self.a, (self.scale * self.e)[:, None] * self.b

  def delta(self):
    return jnp.matmul(*self.factors(), precision="highest")

  def size(self) -> int:
    return super().size() + int(self.rank.sum())

  def inert(self):
    return dataclasses.replace(super().inert(), e=0 * self.e)

  def to_peft(self, embedding=False):
    r = int(self.rank)
    return {"lora_A": self.a[:, :r].T, "lora_B": self.b[:r].T,
            "lora_E": self.e[:r, None]}

  @classmethod
  def from_peft(cls, tensors, slot):
    plain = lora.LoRA.from_peft(
        {f"lora_{x}.weight": tensors[f"lora_{x}"] for x in "AB"}, slot)
    e = jnp.asarray(tensors["lora_E"], jnp.float32)[:, 0]
    return cls(a=plain.a, b=plain.b, e=jnp.pad(
        e, (0, slot.width - e.shape[0])), **slot.values())

  @classmethod
  def peft_rank(cls, tensors):
    return tensors["lora_A"].shape[0]


def init(key, weight, slot, shared=None):
  """The adapter of one module before the first step."""
  del shared
  if slot.given is not None:
    raise errors.UsageError(
        "adapter.init takes A and B out of the weight, and AdaLoRA draws them; "
        "use adapter.init=default")
  i, o = weight.shape[-2:]
  used = (jnp.arange(slot.width) < slot.rank).astype(jnp.float32)
  first, second = jax.random.split(key)
  return AdaLoRA(
      a=DEVIATION * jax.random.normal(first, (i, slot.width)) * used,
      b=DEVIATION * jax.random.normal(second, (slot.width, o)) * used[:, None],
      e=jnp.zeros(slot.width, jnp.float32), **slot.values())


def kept(adapter: AdaLoRA) -> np.ndarray:
  """Which triplets are not pruned, bool like `adapter.e`."""
  used = np.arange(adapter.e.shape[-1]) < np.asarray(adapter.rank)[..., None]
  return (np.asarray(adapter.e) != 0) & used


def to_lora(adapters: base.Adapters) -> base.Adapters:
  """A trained AdaLoRA in its real sizes: LoRAs of the triplets that are kept.

  E and the scale are in their A, and their own scale is 1; see
  `to_lora_config`. Targets of which nothing is kept are left out.

  Args:
    adapters: whole tree; other adapters than AdaLoRA's stay as they are.
  """

  def convert(adapter):
    if not isinstance(adapter, AdaLoRA):
      return adapter
    host = jax.device_get(adapter)
    mask = kept(host)
    rank = mask.sum(-1)
    # Those that are kept first, in their order.
    order = np.argsort(~mask, axis=-1, kind="stable")[..., :rank.max()]
    used = np.take_along_axis(mask, order, -1)
    gain = np.take_along_axis(
        np.asarray(host.scale)[..., None] * host.e, order, -1) * used
    a = np.take_along_axis(host.a, order[..., None, :], -1)
    b = np.take_along_axis(host.b, order[..., :, None], -2)
    return lora.LoRA(
        a=jnp.asarray(a * gain[..., None, :]),
        b=jnp.asarray(b * used[..., :, None]),
        scale=jnp.asarray(rank > 0, jnp.float32),
        rate=jnp.asarray(host.rate), rank=jnp.asarray(rank, jnp.int32))

  def every(part):
    found = {name: convert(adapter) for name, adapter in part.items()}
    return {name: a for name, a in found.items()
            if not (isinstance(part[name], AdaLoRA) and not a.rank.any())}

  return dataclasses.replace(
      adapters, layers=every(adapters.layers), outer=every(adapters.outer))


def to_lora_config(
    config: config_lib.AdapterConfig, adapters: base.Adapters,
    paths: Mapping[str, Sequence[str]],
) -> config_lib.AdapterConfig:
  """The adapter block of what `to_lora` makes.

  Args:
    config: of the AdaLoRA.
    adapters: made by `to_lora`.
    paths: module paths by target.
  """
  ranks = {
      path: int(rank)
      for name, adapter in (adapters.layers | adapters.outer).items()
      if isinstance(adapter, lora.LoRA)
      for path, rank in zip(
          paths[name], np.atleast_1d(adapter.rank), strict=True) if rank}
  most = max(ranks.values(), default=1)
  return dataclasses.replace(
      config, method="lora", options={}, rank=most, alpha=float(most),
      rank_pattern=ranks,
      alpha_pattern={path: float(rank) for path, rank in ranks.items()})


def rule(config: config_lib.AdapterConfig, steps: int) -> method.Rule:
  """What this adds to training; see `allocation`.

  Raises:
    errors.UsageError: if the phases do not fit the run, or nothing is pruned.
  """
  options = config.options
  if options.target_r > config.rank:
    raise errors.UsageError(
        f"adapter.options.target_r={options.target_r} is above adapter.rank="
        f"{config.rank}, the rank at first; lower it")
  if steps and options.tinit + options.tfinal >= steps:
    raise errors.UsageError(
        f"adapter.options.tinit={options.tinit} and tfinal={options.tfinal} "
        f"leave none of train.steps={steps} to prune in; lower them")
  return allocation.Allocation(options, steps)


def _config(config: config_lib.AdapterConfig) -> dict[str, Any]:
  options, alpha = config.options, float(config.alpha)
  return {
      "init_r": options.init_r or config.rank, "target_r": options.target_r,
      "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
      "lora_dropout": float(config.dropout), "tinit": options.tinit,
      "tfinal": options.tfinal, "deltaT": options.delta_t,
      "beta1": options.beta1, "beta2": options.beta2,
      "orth_reg_weight": options.orth_reg,
      # PEFT reads no file without, not even of an adapter that is done with
      # training; this is the least that it takes.
      "total_step": options.tinit + options.tfinal + 1,
      # Of tensors without their pruned triplets. Ours have E = 0 there.
      "rank_pattern": None,
      "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True}


def _block(config: Mapping[str, Any]) -> dict[str, Any]:
  # After pruning, ranks are those of the tensors, and the scale is not.
  first = int(config.get("init_r", 12))
  pruned = bool(config.get("rank_pattern"))
  return {
      "rank": first, "alpha": config.get("lora_alpha", 8),
      "dropout": float(config.get("lora_dropout") or 0.0),
      "options": {
          "init_r": first,
          # Trained further, it keeps what was kept.
          "target_r": first if pruned else config.get("target_r", 8),
          "tinit": config.get("tinit", 0), "tfinal": config.get("tfinal", 0),
          "delta_t": config.get("deltaT", 1),
          "beta1": config.get("beta1", 0.85),
          "beta2": config.get("beta2", 0.85),
          "orth_reg": config.get("orth_reg_weight", 0.5)}}


METHOD = method.Method(
    summary="h = x W0 + alpha/r x A diag(E) B, the least important E pruned",
    paper="arXiv 2303.10512", adapter=AdaLoRA, init=init,
    count="r * (i + o + 1)", options=Options,
    scale=lambda alpha, r, options: alpha / ((options.init_r or r) + 1e-5),
    zero_gradients=("a", "b"), rule=rule,
    tiny={"options": {"target_r": 2}},
    form=method.Form(
        peft_type="ADALORA", config=_config, block=_block,
        neutral=lora.NEUTRAL))
