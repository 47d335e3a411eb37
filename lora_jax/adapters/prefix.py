"""Prefix tuning (Li and Liang 2021, arXiv 2101.00190).

  softmax over [prefix keys, keys] of q, values likewise, in every layer

with n trained keys and values a layer. Every segment of a packed row sees the
prefix, whose keys are not rotated; tokens stand at positions n, n + 1, ...

Trainable parameters: 2 n k e a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import errors
from lora_jax import struct
from lora_jax import types
from lora_jax.adapters import base
from lora_jax.adapters import config as config_lib
from lora_jax.adapters import method


@dataclasses.dataclass(frozen=True)
class Options:
  """Attributes:

    tokens: n.
  """

  tokens: int = 20

  def validate(self) -> None:
    if not 1 <= self.tokens <= 4096:
      raise errors.UsageError(
          f"adapter.options.tokens={self.tokens} is out of range; use an "
          "integer from 1 to 4096")


@struct.dataclass
class Prefix(base.Adapter):
  """Attributes:

    keys, values: `[n, k, e]`.
    rank: `[]` int32.
  """

  keys: types.Array = base.trained(None, "heads", None)
  values: types.Array = base.trained(None, "heads", None)
  rank: types.Array = base.frozen()

  def prefix(self):
    return self.keys, self.values, self.rank > 0


def init(key, weight, slot, shared=None):
  """The adapter of one layer before the first step: N(0, 1), as PEFT's."""
  del weight, shared
  g = slot.geometry
  shape = (slot.options.tokens, g.k, g.e)
  first, second = jax.random.split(key)
  return Prefix(keys=jax.random.normal(first, shape),
                values=jax.random.normal(second, shape), rank=slot.rank)


def _config(config: config_lib.AdapterConfig) -> dict[str, Any]:
  return {"num_virtual_tokens": config.options.tokens,
          "prefix_projection": False, "encoder_hidden_size": None}


def _block(config: Mapping[str, Any]) -> dict[str, Any]:
  return {"options": {"tokens": int(config["num_virtual_tokens"])}}


def _tensors(adapters: base.Adapters) -> dict[str, Any]:
  """PEFT's `[n, 2 l k e]`: layer by layer the keys, then the values."""
  one = adapters.layers["self_attn"]
  pair = jnp.stack([one.keys, one.values], 1)  # [l, 2, n, k, e]
  n = pair.shape[2]
  return {"prompt_embeddings": jnp.moveaxis(pair, 2, 0).reshape(n, -1)}


def _adapters(tensors, config, geometry) -> base.Adapters:
  del config
  g = geometry
  flat = jnp.asarray(tensors["prompt_embeddings"], jnp.float32)
  pair = jnp.moveaxis(flat.reshape(-1, g.l, 2, g.k, g.e), 0, 2)
  return base.Adapters(layers={"self_attn": Prefix(
      keys=pair[:, 0], values=pair[:, 1], rank=jnp.ones(g.l, jnp.int32))})


METHOD = method.Method(
    summary="attention over [P_k, k] and [P_v, v]", paper="arXiv 2101.00190",
    adapter=Prefix, init=init, count="2 * tokens * k * e", options=Options,
    targets="self_attn", sites=("self_attn",), ranked=False,
    identity_at_init=False, mergeable=False, tiny={"options": {"tokens": 3}},
    form=method.Form(
        peft_type="PREFIX_TUNING", config=_config, block=_block,
        lists_targets=False, tensors=_tensors, adapters=_adapters))
