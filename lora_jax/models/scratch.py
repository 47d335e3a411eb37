"""Pretraining: a source of fresh weights for an architecture of one's own.

`Scratch` is a checkpoint that was never written: `load.convert` reads it a
tensor at a time, quantises it, and spreads it over devices like any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import json
import math
import pathlib
import types
import typing
from typing import Any

import jax
import numpy as np

from lora_jax import errors
from lora_jax.models import config as config_lib
from lora_jax.models import hf
from lora_jax.models import init
from lora_jax.models import registry
from lora_jax.models.checkpoints import scheme as scheme_lib

FIELD = "model.scratch"
# What a text may say. Others (RoPE, ids, windows) are the checkpoint's.
KINDS = (bool, int, float, str)
# Part of every fingerprint; another rule for drawing is another version.
VERSION = 1


class Scratch:
  """Weights as `init.fresh_base` draws them; a `load.Source`.

  Attributes:
    config: the model's.
    label: what messages call it: the checkpoint that it is changed from, of
      which it has the tokenizer.
    scheme: None: nothing is quantised yet.
    tensors: by Hugging Face's names, the layer and the slots that each holds.
    files: none.
  """

  scheme: scheme_lib.Scheme | None = None
  files: Sequence[pathlib.Path] = ()

  def __init__(
      self, config: config_lib.ModelConfig, seed: int, label: str = "scratch"):
    self.config, self.label = config, label
    self.tensors = {
        hf.hf_name(layer, target, parts[0].leaf): (layer, parts)
        for target, parts in hf.groups(config)
        for layer in (range(config.n_layers) if parts[0].stacked else (None,))}
    self._key = jax.random.key(seed)
    # What the tensors are made of, in place of their bytes: devices round
    # otherwise, and the model is still the same one.
    text = json.dumps([VERSION, seed, dataclasses.asdict(config)])
    self._origin = np.frombuffer(text.encode(), np.uint8)

  def read(self, name: str) -> hf.Tensor:
    """One tensor in float32, in Hugging Face's layout."""
    layer, parts = self.tensors[name]
    array = np.concatenate([
        np.asarray(init.fresh(self._key, self.config, slot, layer))
        for slot in parts])
    return hf.Tensor("F32", self._origin, array)


def changed(
    config: config_lib.ModelConfig, fields: Mapping[str, Any]
) -> config_lib.ModelConfig:
  """An architecture with some fields changed.

  What is not given, and what a family derives of other fields, follows them:
  `head_dim`, if it was d / h; which layers have a window.

  Args:
    config: what to start from.
    fields: of `ModelConfig`, as values or as texts ("6", "true", "none").

  Raises:
    errors.UsageError: for an unknown field, a value that is none, shapes that
      do not fit, or what Hugging Face's models of the family cannot have.
  """
  values = {name: _value(config, name, value)
            for name, value in fields.items()}
  new = dataclasses.replace(config, **values)
  errors.choose(
      f"{FIELD}: activation", new.activation, config_lib.HF_ACTIVATIONS)
  for name in ("vocab_size", "d_model", "d_ff", "n_layers", "n_heads",
               "n_kv_heads", "head_dim", "max_position"):
    if getattr(new, name) < 1:
      raise errors.UsageError(
          f"{FIELD}: {name}={getattr(new, name)} is out of range; use an "
          "integer of at least 1")
  if "head_dim" not in values and (
      config.head_dim * config.n_heads == config.d_model):
    _divides(new, "n_heads", "d_model", values)
    new = dataclasses.replace(new, head_dim=new.d_model // new.n_heads)
  _divides(new, "n_kv_heads", "n_heads", values)
  if new.head_dim % 2:
    raise errors.UsageError(
        f"{FIELD}: head_dim={new.head_dim} is odd, and RoPE rotates pairs; "
        "set head_dim, or another d_model or n_heads")
  return _readable(config, new, values)


def _value(config, name: str, given: Any) -> Any:
  """A field's value of its text, checked."""
  hints = typing.get_type_hints(config_lib.ModelConfig)
  options = _options(errors.choose(FIELD, name, hints))
  kind = next((k for k in KINDS if k in options), None)
  if kind is None:
    known = ", ".join(
        n for n, hint in hints.items() if {*KINDS} & {*_options(hint)})
    raise errors.UsageError(
        f"{FIELD}: {name} cannot be changed; what can: {known}")
  text = str(given).strip()
  if type(None) in options and text.lower() == "none":
    return None
  try:
    if kind is bool:
      return {"true": True, "false": False}[text.lower()]
    if kind is not float or math.isfinite(float(text)):
      return kind(text)
  except (KeyError, ValueError):
    pass
  example = getattr(config, name)
  raise errors.UsageError(
      f"{FIELD}: {name}={text} is no {kind.__name__}; the checkpoint has "
      f"{name}={example}")


def _options(hint: Any) -> tuple[Any, ...]:
  """`int | None` as its parts."""
  return (typing.get_args(hint)
          if typing.get_origin(hint) is types.UnionType else (hint,))


def _divides(config, part: str, whole: str, given) -> None:
  a, b = getattr(config, part), getattr(config, whole)
  if b % a:
    def said(name):
      origin = "" if name in given else " (the checkpoint's)"
      return f"{name}={getattr(config, name)}{origin}"

    raise errors.UsageError(
        f"{FIELD}: {said(part)} does not divide {said(whole)}; set "
        f"{part if part not in given else whole} as well, or another {part}")


def _readable(old, new, given) -> config_lib.ModelConfig:
  """The architecture as its own `config.json` is read, if that says it all.

  What is trained is saved in Hugging Face's form, and must be the same model
  there.
  """
  said = new.to_hf()
  if new.n_layers != old.n_layers:
    said.pop("layer_types", None)  # Those of the family, for the new number.
  try:
    read = registry.from_hf(said, FIELD)
  except errors.UserError as error:
    raise errors.UsageError(str(error)) from None
  for name in given:
    asked, found = getattr(new, name), getattr(read, name)
    if asked != found:
      raise errors.UsageError(
          f"{FIELD}: {name}={asked}, but {new.family} models of this shape "
          f"have {found}; set {name}={found}, or leave it out")
  return read
