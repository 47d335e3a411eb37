"""Cartridges (Eyuboglu et al. 2025, arXiv 2506.06266): a cache that is trained.

  softmax over [S_k, P_k, k] of q, values [S_v, P_v, v], in every layer

Prefix tuning (see `prefix`) whose first m keys and values S `[m, k, e]` stay
what they are: models use their first tokens as a sink of attention, and
training is not stable where these move. P `[n - m, k, e]` is trained; both
start at N(0, 1).

The paper starts them at the keys and values of a text's first n tokens, which
takes a run of the model. That is PEFT's `initialize_kv_prefix_from_text`,
whose folder can be read here and trained; there is no option for it. The
paper's data, questions that the model asks itself about a text, is as any
other.

Trainable parameters: 2 (n - m) k e a layer.
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
from lora_jax.adapters import prefix


@dataclasses.dataclass(frozen=True)
class Options:
  """Attributes:

    tokens: n.
    frozen: m, of them.
  """

  tokens: int = 128
  frozen: int = 1

  def validate(self) -> None:
    prefix.check_tokens(self.tokens)
    if not 0 <= self.frozen < self.tokens:
      raise errors.UsageError(
          f"adapter.options.frozen={self.frozen} is out of range; use an "
          f"integer from 0 to {self.tokens - 1}, for one of adapter.options."
          f"tokens={self.tokens} has to be trained")


@struct.dataclass
class Cartridge(base.Adapter):
  """Attributes:

    keys, values: P, `[n - m, k, e]`.
    sink_keys, sink_values: S, `[m, k, e]`.
    rank: `[]` int32.
  """

  keys: types.Array = base.trained(None, "heads", None)
  values: types.Array = base.trained(None, "heads", None)
  sink_keys: types.Array = base.frozen(None, "heads", None)
  sink_values: types.Array = base.frozen(None, "heads", None)
  rank: types.Array = base.frozen()

  def prefix(self):
    return self.folded(None).prefix()

  def folded(self, shared):
    del shared
    return prefix.Prefix(
        keys=jnp.concatenate([self.sink_keys, self.keys]),
        values=jnp.concatenate([self.sink_values, self.values]),
        rank=self.rank)


def parted(keys, values, rank, frozen: int) -> Cartridge:
  """Keys and values `[..., n, k, e]` as those that are frozen and the rest."""
  return Cartridge(
      keys=keys[..., frozen:, :, :], values=values[..., frozen:, :, :],
      sink_keys=keys[..., :frozen, :, :],
      sink_values=values[..., :frozen, :, :], rank=rank)


def init(key, weight, slot, shared=None):
  """The adapter of one layer before the first step."""
  del weight, shared
  g, options = slot.geometry, slot.options
  keys, values = (
      jax.random.normal(one, (options.tokens, g.k, g.e))
      for one in jax.random.split(key))
  return parted(keys, values, slot.rank, options.frozen)


def _config(config: config_lib.AdapterConfig) -> dict[str, Any]:
  return {"num_virtual_tokens": config.options.tokens,
          "num_frozen_tokens": config.options.frozen}


def _block(config: Mapping[str, Any]) -> dict[str, Any]:
  return {"options": {"tokens": int(config["num_virtual_tokens"]),
                      "frozen": int(config.get("num_frozen_tokens", 1))}}


def _adapters(tensors, config, geometry) -> base.Adapters:
  one = prefix.adapters_of(tensors, config, geometry).layers["self_attn"]
  return base.Adapters(layers={"self_attn": parted(
      one.keys, one.values, one.rank, config.options.frozen)})


METHOD = method.Method(
    summary="attention over [S_k, P_k, k] and [S_v, P_v, v], S frozen",
    paper="arXiv 2506.06266", adapter=Cartridge, init=init,
    count="2 * (tokens - frozen) * k * e", options=Options,
    targets="self_attn", sites=("self_attn",), ranked=False,
    identity_at_init=False, mergeable=False,
    tiny={"options": {"tokens": 3, "frozen": 1}},
    form=method.Form(
        peft_type="CARTRIDGE", config=_config, block=_block,
        lists_targets=False, tensors=prefix.tensors_of, adapters=_adapters))
