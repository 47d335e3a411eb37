"""GLoRA: generalised low-rank adaptation (Chavan et al. 2023, 2306.07967).

  h = x (W0 + W0 * A + B) + bias * (1 + D) + E

A and B `[i, o]` are low-rank ("lora": X_u' X_d', X_d `[o, r]` = 0 and X_u `[r,
i]` ~ U(-1/sqrt(i), 1/sqrt(i)) at init), a value an output ("vector"), a single
one ("constant"), or 0 ("none"); D and E a value an output, a single one, or 0.
All start as 0, so that h is the base's. D and E are of projections that have a
bias, as in Hugging Face PEFT. The paper's C, which adds C W0 to the bias, is
not trained here.

Trainable parameters: 2 r (i + o), 2 o, 2 or 0 a matrix, and 2 o, 2 or 0 a bias.
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
from lora_jax.adapters import pieces


@dataclasses.dataclass(frozen=True)
class Options:
  """Attributes:

    weight: of A and B: "lora", "vector", "constant" or "none".
    bias: of D and E: "vector", "constant" or "none".
  """

  weight: str = "lora"
  bias: str = "constant"

  def validate(self) -> None:
    """Raises a `UsageError` if a value is none that is known."""
    values = ("vector", "constant", "none")
    errors.choose("adapter.options.weight", self.weight,
                  dict.fromkeys(("lora", *values)))
    errors.choose("adapter.options.bias", self.bias, dict.fromkeys(values))

  def parameters(self, i: int, o: int, r: int, biased: bool) -> int:
    """Trained, of one projection."""
    sizes = {"lora": r * (i + o), "vector": o, "constant": 1, "none": 0}
    return 2 * sizes[self.weight] + 2 * biased * sizes[self.bias]


# Fields by PEFT's suffix.
SUFFIXES = {
    "a_d": "A.Xd", "a_u": "A.Xu", "b_d": "B.Xd", "b_u": "B.Xu", "a": "A.X",
    "b": "B.X", "d": "D.X", "e": "E.X"}


@struct.dataclass
class GLoRA(base.Adapter):
  """Attributes (PEFT's layout; None where there is no such):

    a_d, a_u, b_d, b_u: `[o, r]` and `[r, i]`, of A and B.
    a, b: `[o, 1]` or `[1]`, of A and B.
    d, e: `[o]` or `[1]`.
    rank: `[]` int32, 0: not adapted.
    shape: static, (i, o).
  """

  rank: types.Array = base.frozen()
  a_d: types.Array | None = base.up("out", None, default=None)
  a_u: types.Array | None = base.trained(None, "in", default=None)
  b_d: types.Array | None = base.up("out", None, default=None)
  b_u: types.Array | None = base.trained(None, "in", default=None)
  a: types.Array | None = base.trained(default=None)
  b: types.Array | None = base.trained(default=None)
  d: types.Array | None = base.trained(default=None)
  e: types.Array | None = base.trained(default=None)
  shape: tuple[int, int] = base.static(default=(0, 0))

  def _of_outputs(self, name):
    """A value an output `[o]`, or one for all `[1]`."""
    value = getattr(self, name)
    if value is None:
      return jnp.zeros(1)
    return self.active(value.reshape(-1), 0.0)

  def _matrix(self, name):
    """A or B, `[i, o]` float32 or what broadcasts to it."""
    up, down = getattr(self, f"{name}_u"), getattr(self, f"{name}_d")
    if down is None:
      return self._of_outputs(name)
    return jnp.matmul(
        up.T, self.active(down, 0.0).T, precision="highest")

  def delta(self, weight: types.Tree) -> jax.Array:
    """W0 * A + B, `[i, o]` float32."""
    w = jax.lax.stop_gradient(quant.dequantize(weight, jnp.float32))
    return w * self._matrix("a") + self._matrix("b")

  def apply(self, x, weight, noise=None):
    del noise
    y = quant.matmul(x, weight)
    if self.a_d is not None:
      return y + pieces.dense(x, GLoRA.delta, self, weight)
    # In float32, in which gradients are summed over tokens.
    added = y.astype(jnp.float32) * self._of_outputs("a") + jnp.sum(
        x.astype(jnp.float32), -1, keepdims=True) * self._of_outputs("b")
    return y + added.astype(y.dtype)

  def shift(self, bias):
    if bias is None:
      return None
    return bias + bias * self._of_outputs("d") + self._of_outputs("e")

  def merge(self, weight):
    return quant.dequantize(weight, jnp.float32) + self.delta(weight)

  def to_peft(self, embedding=False):
    found = {f"glora_{suffix}": getattr(self, name)
             for name, suffix in SUFFIXES.items()
             if getattr(self, name) is not None}
    # PEFT saves the zeros of what is not trained.
    i, o = self.shape
    zeros = {"A": (o, i), "B": (o, i), "C": (i, 1), "D": (o,), "E": (o,)}
    return found | {
        f"glora_{part}.zeros": jnp.zeros(shape)
        for part, shape in zeros.items()
        if not any(name.startswith(f"glora_{part}.") for name in found)}

  @classmethod
  def from_peft(cls, tensors, slot):
    return cls(rank=slot.rank, shape=slot.shape, **{
        name: jnp.asarray(tensors[f"glora_{suffix}"], jnp.float32)
        for name, suffix in SUFFIXES.items() if f"glora_{suffix}" in tensors})


def init(key, weight, slot, shared=None):
  """The adapter of one module before the first step."""
  del shared
  (i, o), r, options = weight.shape[-2:], slot.width, slot.options
  found: dict[str, Any] = {}
  if options.weight == "lora":
    for name, k in zip("ab", jax.random.split(key), strict=True):
      found[f"{name}_d"] = jnp.zeros((o, r), jnp.float32)
      found[f"{name}_u"] = pieces.uniform(k, (r, i), i)
  elif options.weight != "none":
    shape = (o, 1) if options.weight == "vector" else (1,)
    found |= dict.fromkeys("ab", jnp.zeros(shape, jnp.float32))
  if options.bias != "none" and slot.target in slot.geometry.biased:
    size = o if options.bias == "vector" else 1
    found |= dict.fromkeys("de", jnp.zeros(size, jnp.float32))
  return GLoRA(rank=slot.rank, shape=(i, o), **found)


def _config(config: config_lib.AdapterConfig) -> dict[str, Any]:
  return {"r": config.rank, "config_A_B": config.options.weight,
          "config_C": "none", "config_D_E": config.options.bias,
          "bias": "none", "init_weights": True}


def _block(config: Mapping[str, Any]) -> dict[str, Any]:
  return {"rank": int(config["r"]), "options": {
      "weight": config.get("config_A_B", "lora"),
      "bias": config.get("config_D_E", "constant")}}


METHOD = method.Method(
    summary="h = x (W0 + W0 * A + B) + bias * (1 + D) + E",
    paper="arXiv 2306.07967", adapter=GLoRA, init=init,
    count="options.parameters(i, o, r, target in biased)", options=Options,
    zero_gradients=("a_u", "b_u"),
    # A file with C says so in its tensors, unless no projection has a bias.
    form=method.Form(peft_type="GLORA", config=_config, block=_block,
                     neutral={"bias": ("none",)}))
