"""DeLoRA: decoupled low-rank adaptation (Bini et al. 2025, arXiv 2503.18225).

  h = x W0 + (dropout(x) * w) A D B,   D = diag(lambda / (r |a_k| |b_k|))

with the norms of A's columns a_k `[i]` and B's rows b_k `[o]` taken out, so
that lambda alone bounds the change: ||A D B|| <= lambda (Frobenius). w `[i]`,
the norms of W0's rows, is fixed. Norms are taken to be 1e-4 at least. A `[i,
r]` ~ U(-1/sqrt(i), 1/sqrt(i)), B `[r, o]` = 0 and lambda = 15 at init, so that
h = x W0.

Trainable parameters: r (i + o) + 1 a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax.numpy as jnp

from lora_jax import errors
from lora_jax import quant
from lora_jax import struct
from lora_jax import types
from lora_jax.adapters import additive
from lora_jax.adapters import base
from lora_jax.adapters import config as config_lib
from lora_jax.adapters import method
from lora_jax.adapters import pieces

LEAST = 1e-4  # What norms are taken to be at least.


@dataclasses.dataclass(frozen=True)
class Options:
  """Attributes:

    delora_lambda: where lambda starts.
  """

  delora_lambda: float = 15.0

  def validate(self) -> None:
    """Raises a `UsageError` if a value is out of range."""
    if not self.delora_lambda > 0:
      raise errors.UsageError(
          f"adapter.options.delora_lambda={self.delora_lambda} is out of "
          "range; use a positive number")


@struct.dataclass
class DeLoRA(additive.Additive):
  """Attributes (a leading `l` axis when stacked):

    a: `[i, r]`.
    b: `[r, o]`.
    boundary: `[]`, lambda.
    norms: `[i]`, w.
    rate: `[]`, dropout rate.
    rank: `[]` int32, 0: not adapted; what is wider is not used.
  """

  a: types.Array = base.trained("in", None)
  b: types.Array = base.up(None, "out")
  boundary: types.Array = base.trained()
  norms: types.Array = base.frozen("in")
  rate: types.Array = base.frozen()
  rank: types.Array = base.frozen()

  def factors(self):
    squares = jnp.sum(jnp.square(self.a), 0), jnp.sum(jnp.square(self.b), 1)
    # Below the root: at zero a root has no gradient.
    a, b = (jnp.sqrt(jnp.maximum(s, LEAST**2)) for s in squares)
    used = pieces.used(self.a.shape[-1], self.rank)
    scale = used * self.boundary / jnp.maximum(self.rank, 1) / (a * b)
    return self.norms[:, None] * self.a * scale, self.b

  def size(self) -> int:
    i, o = self.a.shape[-2], self.b.shape[-1]
    return int(self.rank.sum()) * (i + o) + int((self.rank > 0).sum())

  def to_peft(self, embedding=False):
    r = int(self.rank)
    return {
        "delora_A": self.a[:, :r].T, "delora_B": self.b[:r].T,
        "delora_lambda": self.boundary.reshape(1),
        "delora_w_norm": self.norms}

  @classmethod
  def from_peft(cls, tensors, slot):
    boundary, norms = (jnp.asarray(tensors[f"delora_{name}"], jnp.float32)
                       for name in ("lambda", "w_norm"))
    return cls(
        a=pieces.widened(tensors["delora_A"].T, 1, slot.width),
        b=pieces.widened(tensors["delora_B"].T, 0, slot.width),
        boundary=boundary.reshape(()), norms=norms,
        **slot.values("rate", "rank"))

  @classmethod
  def peft_rank(cls, tensors):
    return tensors["delora_A"].shape[0]


def init(key, weight, slot, shared=None):
  """The adapter of one module before the first step."""
  del shared
  i, o = weight.shape[-2:]
  w = quant.dequantize(weight, jnp.float32)
  return DeLoRA(
      a=pieces.uniform(key, (i, slot.width), i),
      b=jnp.zeros((slot.width, o), jnp.float32),
      boundary=jnp.asarray(slot.options.delora_lambda, jnp.float32),
      norms=jnp.linalg.norm(w, axis=1), **slot.values("rate", "rank"))


def _config(config: config_lib.AdapterConfig) -> dict[str, Any]:
  start = config.options.delora_lambda
  return {
      "r": config.rank, "module_dropout": float(config.dropout),
      "delora_lambda": int(start) if start.is_integer() else start,
      "bias": "none", "init_weights": True,
      "rank_pattern": dict(config.rank_pattern), "lambda_pattern": {}}


def _block(config: Mapping[str, Any]) -> dict[str, Any]:
  # Where lambda started, by `lambda_pattern` too, no longer counts.
  return {"rank": int(config["r"]),
          "dropout": float(config.get("module_dropout") or 0.0),
          "rank_pattern": config.get("rank_pattern") or {},
          "options": {"delora_lambda": config.get("delora_lambda", 15)}}


METHOD = method.Method(
    summary="h = x W0 + (x * |W0|) A diag(lambda / (r |a| |b|)) B",
    paper="arXiv 2503.18225", adapter=DeLoRA, init=init,
    count="r * (i + o) + 1", options=Options, patterns=True,
    zero_gradients=("a", "boundary"),
    form=method.Form(
        peft_type="DELORA", config=_config, block=_block,
        neutral={"bias": ("none",)}))
