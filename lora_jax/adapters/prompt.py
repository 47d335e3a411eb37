"""Prompt tuning (Lester et al. 2021, arXiv 2104.08691).

  E' = [P, E[tokens]],  P `[n, d]` trained

The virtual tokens stand before every example, also in a packed row: batches
hold a place for each (`data.virtual`), whose id -1 - j says that it is P[j].
P starts at N(0, 1), at the embeddings of drawn tokens or of given ones.

Trainable parameters: n d.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import errors
from lora_jax import struct
from lora_jax import types
from lora_jax.adapters import base
from lora_jax.adapters import config as config_lib
from lora_jax.adapters import method
from lora_jax.adapters import prefix

# Where the prompt starts, and what PEFT calls it.
STARTS = {"random": "RANDOM", "vocabulary": "SAMPLE_VOCAB", "text": "TEXT"}


@dataclasses.dataclass(frozen=True)
class Options:
  """Attributes:

    tokens: n.
    start: a key of `STARTS`.
    text: of start=text; it is repeated, or cut, to n tokens.
    ids: the tokens of `text`.
    tokenizer: name or path of what made them of it.
  """

  tokens: int = 20
  start: str = "random"
  text: str = ""
  ids: tuple[int, ...] = ()
  tokenizer: str = ""

  def validate(self) -> None:
    prefix.check_tokens(self.tokens)
    errors.choose("adapter.options.start", self.start, STARTS)
    if not all(str(i).isdecimal() for i in self.ids):
      raise errors.UsageError(
          f"adapter.options.ids={self.ids} are not all token ids; use "
          "integers from 0")


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


def start(key: jax.Array, table: types.Array, slot: base.Slot) -> jax.Array:
  """Where P `[n, d]` starts, given the embeddings `[v, d]`.

  Those of words are scaled as the model scales them, for P is not.

  Raises:
    errors.UsageError: if it is to start as a text whose tokens are missing, or
      not the model's.
  """
  assert slot.geometry is not None
  options, (v, d) = slot.options, table.shape
  n = options.tokens
  if options.start == "random":
    return jax.random.normal(key, (n, d))
  if options.start == "vocabulary":
    ids = jax.random.randint(key, (n,), 0, v)
  else:
    given = [int(i) for i in options.ids]
    if not given or max(given) >= v:
      raise errors.UsageError(
          f"adapter.options.start=text: adapter.options.ids={given} are not "
          f"tokens of a vocabulary of {v}; give those of the text")
    ids = jnp.asarray(np.resize(given, n), jnp.int32)
  rows = jnp.take(table, ids, axis=0).astype(jnp.float32)
  return slot.geometry.embed_scale * rows


def init(key, weight, slot, shared=None):
  """The virtual tokens before the first step."""
  del shared
  return Prompt(p=start(key, weight, slot), rank=slot.rank)


def config_of(config: config_lib.AdapterConfig) -> dict[str, Any]:
  """Keys of adapter_config.json that all prompts have."""
  options = config.options
  # PEFT refuses a text without a tokenizer.
  by_text = options.start == "text" and options.text and options.tokenizer
  kept = options.start != "text" or by_text
  return {
      "num_virtual_tokens": options.tokens,
      "prompt_tuning_init": STARTS[options.start if kept else "random"],
      "prompt_tuning_init_text": options.text if by_text else None,
      "tokenizer_name_or_path": options.tokenizer if by_text else None}


def options_of(config: Mapping[str, Any]) -> dict[str, Any]:
  """Inverse of `config_of`: `Options` by name."""
  names = {value: name for name, value in STARTS.items()}
  return {"tokens": int(config["num_virtual_tokens"]),
          # Others start at another adapter, which is no concern of this one.
          "start": names.get(str(config.get("prompt_tuning_init")), "random"),
          "text": config.get("prompt_tuning_init_text") or "",
          "tokenizer": config.get("tokenizer_name_or_path") or ""}


def tensors_of(adapters: base.Adapters) -> dict[str, Any]:
  """What the file holds: the virtual tokens, whatever they are made of."""
  return {"prompt_embeddings": jax.jit(lambda a: a.virtual())(
      adapters.outer["prompt"])}


def embeddings(tensors, config, geometry) -> jax.Array:
  """P `[n, d]` of a file.

  Raises:
    KeyError, ValueError: if it is not there, or of other sizes.
  """
  p = jnp.asarray(tensors["prompt_embeddings"], jnp.float32)
  return p.reshape(config.options.tokens, geometry.d)


def adapters_of(tensors, config, geometry) -> base.Adapters:
  """Inverse of `tensors_of`."""
  return base.Adapters(outer={"prompt": Prompt(
      p=embeddings(tensors, config, geometry), rank=jnp.int32(1))})


METHOD = method.Method(
    summary="E' = [P, E[tokens]]", paper="arXiv 2104.08691", adapter=Prompt,
    init=init, count="tokens * d", options=Options, targets="prompt",
    sites=("prompt",), ranked=False, identity_at_init=False, mergeable=False,
    tiny={"options": {"tokens": 3}},
    form=method.Form(
        peft_type="PROMPT_TUNING", config=config_of,
        block=lambda config: {"options": options_of(config)},
        lists_targets=False, tensors=tensors_of, adapters=adapters_of))
