"""Prompt tuning (Lester et al. 2021, arXiv 2104.08691).

  E' = [P, E[tokens]],  P `[n, d]` trained

The virtual tokens stand before every example, also in a packed row: batches
hold a place for each (`data.virtual`), whose id -1 - j says that it is P[j].

Trainable parameters: n d.
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
class Prompt(base.Adapter):
  """Attributes:

    p: `[n, d]`.
    rank: `[]` int32.
  """

  p: types.Array = base.trained(None, None)
  rank: types.Array = base.frozen()

  def virtual(self):
    return self.p


def init(key, weight, slot, shared=None):
  """Virtual tokens before the first step: those of drawn words, N(0, 1)."""
  del shared
  shape = (slot.options.tokens, weight.shape[-1])
  return Prompt(p=jax.random.normal(key, shape), rank=slot.rank)


def _config(config: config_lib.AdapterConfig) -> dict[str, Any]:
  return {"num_virtual_tokens": config.options.tokens,
          "prompt_tuning_init": "RANDOM"}


def _block(config: Mapping[str, Any]) -> dict[str, Any]:
  return {"options": {"tokens": int(config["num_virtual_tokens"])}}


def _tensors(adapters: base.Adapters) -> dict[str, Any]:
  return {"prompt_embeddings": adapters.outer["prompt"].virtual()}


def _adapters(tensors, config, geometry) -> base.Adapters:
  del config, geometry
  return base.Adapters(outer={"prompt": Prompt(
      p=jnp.asarray(tensors["prompt_embeddings"], jnp.float32),
      rank=jnp.int32(1))})


METHOD = method.Method(
    summary="E' = [P, E[tokens]]", paper="arXiv 2104.08691", adapter=Prompt,
    init=init, count="tokens * d", options=Options, targets="prompt",
    sites=("prompt",), ranked=False, identity_at_init=False, mergeable=False,
    tiny={"options": {"tokens": 3}},
    form=method.Form(
        peft_type="PROMPT_TUNING", config=_config, block=_block,
        lists_targets=False, tensors=_tensors, adapters=_adapters))
