"""DEFT: decompositional efficient fine-tuning (Kumar et al., NeurIPS 2025).

  h = y + (s dropout(x) R - y N) Q',    y = x W0

that is W' = W0 (1 - N Q') + s R Q': what W0 `[i, o]` writes to r directions of
the outputs is taken out, and R `[i, r]` writes there instead. P `[o, r]` ~
N(0, 0.02^2) says which, by `decomposition_method`: "relu" has Q = P and N =
max(P, 0), "qr" the orthonormal Q = N = qr(P). R = W0 N / s at init, so that
h = y. r is at most o; s = 1, or alpha / r with `use_alpha`. PEFT's formulae
are followed, biases stay out.

PaRa (PEFT: `para`) takes out and writes nothing: h = y - y N Q', which is not
the base at init.

Trainable parameters: r (i + o) a matrix; PaRa: r o.
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

DEVIATION = 0.02  # Of P at the start.
WAYS = ("relu", "qr")


@dataclasses.dataclass(frozen=True)
class ParaOptions:
  """Attributes:

    decomposition_method: "relu" or "qr".
  """

  decomposition_method: str = "relu"

  def validate(self) -> None:
    """Raises a `UsageError` if a value is none that is known."""
    errors.choose("adapter.options.decomposition_method",
                  self.decomposition_method, dict.fromkeys(WAYS))


@dataclasses.dataclass(frozen=True)
class Options(ParaOptions):
  """PaRa's, and attributes:

    use_alpha: whether s = alpha / r.
  """

  use_alpha: bool = False


@struct.dataclass
class PaRa(base.Adapter):
  """Attributes (a leading `l` axis when stacked):

    p: `[o, r]`.
    rank: `[]` int32, 0: not adapted.
    way: "relu" or "qr".
  """

  p: types.Array = base.trained("out", None)
  rank: types.Array = base.frozen()
  way: str = base.static(default="relu")

  def projection(self) -> tuple[jax.Array, jax.Array]:
    """Q and N, `[o, r]` float32."""
    if self.way == "relu":
      return self.p, jax.nn.relu(self.p)
    q, _ = jnp.linalg.qr(self.p)
    return q, q

  def written(self, x: types.Array) -> jax.Array | float:
    """What is written to the directions instead, `[..., r]` float32."""
    del x
    return 0.0

  def apply(self, x, weight, noise=None):
    y = quant.matmul(x, weight)
    if noise is not None and hasattr(self, "rate"):
      x = noise.dropout(x, self.rate)
    q, n = self.projection()
    # Two numbers that cancel at the start: their difference in float32.
    low = self.written(x) - _low(y, n)
    return y + self.active(low, 0.0).astype(x.dtype) @ q.T.astype(x.dtype)

  def merge(self, weight):
    w = quant.dequantize(weight, jnp.float32)
    q, n = self.projection()
    low = self.written(jnp.eye(w.shape[0])) - jnp.matmul(
        w, n, precision="highest")
    return w + jnp.matmul(self.active(low, 0.0), q.T, precision="highest")

  def to_peft(self, embedding=False):
    return {"deft_P": self.p}

  @classmethod
  def from_peft(cls, tensors, slot):
    return cls(p=jnp.asarray(tensors["deft_P"], jnp.float32), rank=slot.rank,
               way=slot.options.decomposition_method)

  @classmethod
  def peft_rank(cls, tensors):
    return tensors["deft_P"].shape[1]


@struct.dataclass
class DEFT(PaRa):
  """PaRa's, and attributes:

    injection: R `[i, r]`.
    scale: `[]`, s.
    rate: `[]`, rate of dropout of what R reads.
  """

  injection: types.Array = base.trained("in", None, default=None)
  scale: types.Array = base.frozen(default=None)
  rate: types.Array = base.frozen(default=None)

  def written(self, x):
    return self.scale * _low(x, self.injection)

  def to_peft(self, embedding=False):
    return {"deft_P": self.p, "deft_R": self.injection.T}

  @classmethod
  def from_peft(cls, tensors, slot):
    return cls(
        p=jnp.asarray(tensors["deft_P"], jnp.float32),
        injection=jnp.asarray(tensors["deft_R"], jnp.float32).T,
        way=slot.options.decomposition_method, **slot.values())


def _low(x, matrix):
  """x M `[..., r]`, operands in x's dtype and sums in float32."""
  precision = "highest" if x.dtype == jnp.float32 else None
  return jnp.matmul(x, matrix.astype(x.dtype), precision=precision,
                    preferred_element_type=jnp.float32)


def init_para(key, weight, slot, shared=None):
  """The adapter of one module before the first step."""
  del shared
  o = weight.shape[-1]
  p = DEVIATION * jax.random.normal(key, (o, min(slot.width, o)), jnp.float32)
  return PaRa(p=p, rank=slot.rank, way=slot.options.decomposition_method)


def init(key, weight, slot, shared=None):
  """The adapter of one module before the first step."""
  plain = init_para(key, weight, slot, shared)
  scale = slot.scale
  if slot.options.use_alpha:  # By the rank that there is.
    scale = scale * (slot.width / plain.p.shape[1])
  _, n = plain.projection()
  r = jnp.matmul(
      quant.dequantize(weight, jnp.float32), n, precision="highest")
  # A layer that is not adapted has no scale.
  return DEFT(p=plain.p, way=plain.way, injection=r / plain.active(scale, 1.0),
              scale=scale, **slot.values("rate", "rank"))


def _shared_config(config: config_lib.AdapterConfig) -> dict[str, Any]:
  return {"r": config.rank,
          "decomposition_method": config.options.decomposition_method,
          "bias": "none", "fan_in_fan_out": False}


def _config(config: config_lib.AdapterConfig) -> dict[str, Any]:
  alpha = float(config.alpha)
  alpha = int(alpha) if alpha.is_integer() else alpha
  return _shared_config(config) | {
      "alpha": alpha if config.options.use_alpha else None,
      "deft_dropout": float(config.dropout), "para": False,
      "init_scale": 1.0, "init_weights": True}


def _para_block(config: Mapping[str, Any]) -> dict[str, Any]:
  return {"rank": int(config["r"]), "options": {
      "decomposition_method": config.get("decomposition_method", "relu")}}


def _block(config: Mapping[str, Any]) -> dict[str, Any]:
  found = _para_block(config) | {
      "dropout": float(config.get("deft_dropout") or 0.0)}
  if config.get("alpha"):
    found["alpha"] = config["alpha"]
    found["options"]["use_alpha"] = True
  return found


NEUTRAL: dict[str, tuple] = {"bias": ("none",), "fan_in_fan_out": (False,)}
METHOD = method.Method(
    summary="h = y + (x R - y N) Q', y = x W0", paper="NeurIPS 2025, 93a34a71",
    adapter=DEFT, init=init, count="min(r, o) * (i + o)", options=Options,
    scale=lambda alpha, r, options: alpha / r if options.use_alpha else 1.0,
    form=method.Form(
        peft_type="DEFT", config=_config, block=_block, neutral=NEUTRAL))
PARA = method.Method(
    summary="h = y - y N Q', y = x W0", paper="arXiv 2406.05641",
    adapter=PaRa, init=init_para, count="min(r, o) * o", options=ParaOptions,
    identity_at_init=False, tiny={"options": {"decomposition_method": "qr"}},
    form=method.Form(
        peft_type="DEFT", config=lambda c: _shared_config(c) | {"para": True},
        block=_para_block, requires={"para": True}, neutral=NEUTRAL))
