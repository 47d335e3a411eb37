"""(IA)^3: rescaled keys, values and activations (Liu et al. 2022, 2205.05638).

  h = l * (x W0 + bias)     attention's keys and values: l `[o]`
  h = (l * x) W0 + bias     the MLP's down projection: l `[i]`

with l = 1 at init, so that h is the base's.

Trainable parameters: o a matrix, i where the input is scaled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import dataclasses
import re
from typing import Any

import jax.numpy as jnp

from lora_jax import errors
from lora_jax import quant
from lora_jax import struct
from lora_jax import types
from lora_jax.adapters import base
from lora_jax.adapters import config as config_lib
from lora_jax.adapters import method
from lora_jax.adapters import targets

# Where a projection is, by target.
PARENTS = {**dict.fromkeys(targets.ATTENTION, "self_attn"),
           **dict.fromkeys(targets.MLP, "mlp")}
MOST_LAYERS = 512

@dataclasses.dataclass(frozen=True)
class Options:
  """Attributes:

    feedforward: targets whose input is scaled, not their output.
  """

  feedforward: tuple[str, ...] = ("down_proj",)

  def validate(self) -> None:
    """Raises a `UsageError` if a target is none."""
    for name in self.feedforward:
      errors.choose("adapter.options.feedforward", name,
                    PARENTS | {"lm_head": ""})


@struct.dataclass
class OutputScale(base.Adapter):
  """Attributes:

    l: `[o]`.
    rank: `[]` int32, 0: not adapted.
  """

  l: types.Array = base.trained("out")  # The paper's name.
  rank: types.Array = base.frozen()

  @property
  def factor(self):
    return self.active(self.l, 1.0)

  def apply(self, x, weight, noise=None):
    del noise
    y = quant.matmul(x, weight)
    # In float32, in which the gradient of l is summed over tokens.
    return (self.factor * y.astype(jnp.float32)).astype(x.dtype)

  def shift(self, bias):
    return None if bias is None else self.factor * bias

  def merge(self, weight):
    return quant.dequantize(weight, jnp.float32) * self.factor

  def to_peft(self, embedding=False):
    return {"ia3_l": self.l[:, None]}

  @classmethod
  def from_peft(cls, tensors, slot):
    l = jnp.asarray(tensors["ia3_l"], jnp.float32)
    return cls(l=l.reshape(-1), rank=slot.rank)


@struct.dataclass
class InputScale(OutputScale):
  """Attributes:

    l: `[i]`.
    rank: `[]` int32, 0: not adapted.
  """

  l: types.Array = base.trained("in")
  rank: types.Array = base.frozen()

  def apply(self, x, weight, noise=None):
    del noise
    scaled = self.factor * x.astype(jnp.float32)
    return quant.matmul(scaled.astype(x.dtype), weight)

  def shift(self, bias):
    return bias

  def merge(self, weight):
    return quant.dequantize(weight, jnp.float32) * self.factor[:, None]

  def to_peft(self, embedding=False):
    return {"ia3_l": self.l[None]}


def kind(slot: base.Slot) -> type[OutputScale]:
  """Which of the two a place has."""
  on_input = slot.target in slot.options.feedforward
  return InputScale if on_input else OutputScale


def init(key, weight, slot, shared=None):
  """The adapter of one module before the first step."""
  del key, shared
  cls = kind(slot)
  size = weight.shape[-2 if cls is InputScale else -1]
  return cls(l=jnp.ones(size, jnp.float32), rank=slot.rank)


def _config(config: config_lib.AdapterConfig) -> dict[str, Any]:
  return {"feedforward_modules": sorted(config.options.feedforward),
          "fan_in_fan_out": False, "init_ia3_weights": True}


def _block(config: Mapping[str, Any]) -> dict[str, Any]:
  return {"options": {"feedforward": feedforward(
      config.get("feedforward_modules") or ())}}


def feedforward(modules: str | Iterable[str]) -> tuple[str, ...]:
  """The targets that PEFT's `feedforward_modules` names in any layer.

  A target of which it names only some layers has tensors of two shapes, which
  the reader refuses.

  Args:
    modules: a regular expression for whole paths, or ends of paths.
  """
  def named(path):
    if isinstance(modules, str):
      return re.fullmatch(modules, path) is not None
    return any(path.endswith(name) for name in modules)

  paths = {name: [f"model.layers.{layer}.{parent}.{name}"
                  for layer in range(MOST_LAYERS)]
           for name, parent in PARENTS.items()} | {"lm_head": ["lm_head"]}
  return tuple(name for name, group in paths.items() if any(map(named, group)))


METHOD = method.Method(
    summary="h = l * (x W0), or (l * x) W0 in the MLP",
    paper="arXiv 2205.05638", adapter=OutputScale, init=init, kind=kind,
    count="i if target in feedforward else o", options=Options,
    targets="k_proj,v_proj,down_proj", ranked=False,
    form=method.Form(
        peft_type="IA3", config=_config, block=_block,
        neutral={"fan_in_fan_out": (False,)}))
