"""LayerNorm tuning: only norms' scales are trained (Zhao et al., 2312.11420).

  norm(x) = x / rms(x) * g,  g `[d]` starting at the base's

Trainable parameters: the norm's width a norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from lora_jax import struct
from lora_jax import types
from lora_jax.adapters import base
from lora_jax.adapters import config as config_lib
from lora_jax.adapters import method
from lora_jax.adapters import targets


@struct.dataclass
class NormScale(base.Adapter):
  """Attributes:

    g: `[d]`, as the checkpoint stores it (Gemma's without the 1).
    rank: `[]` int32, 0: not adapted.
  """

  g: types.Array = base.trained(None)
  rank: types.Array = base.frozen()

  def merge(self, weight):
    return self.active(self.g, weight.astype(jnp.float32))

  def to_peft(self, embedding=False):
    return {"ln_tuning_layers.weight": self.g}

  @classmethod
  def from_peft(cls, tensors, slot):
    return cls(g=jnp.asarray(tensors["ln_tuning_layers.weight"], jnp.float32),
               rank=slot.rank)


def init(key, weight, slot, shared=None):
  """The adapter of one norm before the first step."""
  del key, shared
  return NormScale(g=jnp.array(weight, jnp.float32), rank=slot.rank)


def _config(config: config_lib.AdapterConfig) -> dict[str, Any]:
  del config
  return {}


def _block(config: Mapping[str, Any]) -> dict[str, Any]:
  del config
  return {}


METHOD = method.Method(
    summary="norm(x) = x / rms(x) * g", paper="arXiv 2312.11420",
    adapter=NormScale, init=init, count="width", ranked=False,
    targets="input_layernorm,post_attention_layernorm", sites=targets.NORMS,
    form=method.Form(peft_type="LN_TUNING", config=_config, block=_block))
