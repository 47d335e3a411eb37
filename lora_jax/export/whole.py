"""Modules trained whole, under Hugging Face's names and layouts, both ways."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax import errors
from lora_jax import mesh as mesh_lib
from lora_jax import quant
from lora_jax import types
from lora_jax.adapters import base as base_lib
from lora_jax.adapters import tokens
from lora_jax.models import config as config_lib
from lora_jax.models import hf

OUTER = ("embed_tokens", "lm_head")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROWS = "token_adapter.trainable_tokens_delta"


def tensors(
    adapters: base_lib.Adapters, tied: bool) -> dict[str, np.ndarray]:
  """`model.norm.weight` and the like, and rows of tokens, float32, by name.

  Args:
    adapters: whole tree.
    tied: whether the head is the embedding: PEFT keeps a copy for either name.
  """
  found = {}
  for target, adapter in adapters.outer.items():
    if isinstance(adapter, tokens.TokenRows):
      for suffix, value in adapter.to_peft().items():
        found[f"{hf.OUTER[target]}.{suffix}"] = np.asarray(value, np.float32)
  if adapters.overrides is None:
    return found
  found |= {name: np.ascontiguousarray(value.T if linear else value, np.float32)
            for name, value, linear in _leaves(adapters.overrides)}
  if tied and EMBEDDING in found:
    found[HEAD] = found[EMBEDDING]
  return found


def tables(
    adapters: base_lib.Adapters, base: types.Tree
) -> dict[str, np.ndarray]:
  """The embedding, and an untied head, of a base with a resized vocabulary.

  As PEFT saves them: whoever resizes the original base, with new rows of
  another making, still gets these from the folder.
  """
  found = {}
  for target in OUTER:
    module = getattr(base, target)
    trained = getattr(adapters.overrides, target, None) is not None
    if module is None or trained:
      continue
    weight = getattr(module, "weight", module)
    value = mesh_lib.fetch(quant.dequantize(weight, np.float32))
    adapter = adapters.outer.get(target)
    wrapper = ("" if adapter is None else ".token_adapter.base_layer"
               if isinstance(adapter, tokens.TokenRows) else ".base_layer")
    found[f"{hf.OUTER[target]}{wrapper}.weight"] = (
        np.ascontiguousarray(value if module is weight else value.T))
  return found


def token_indices(
    adapters: base_lib.Adapters) -> list[int] | dict[str, list[int]] | None:
  """`trainable_token_indices` of PEFT."""
  index = tokens.embedding_index(adapters)
  if isinstance(adapters.outer.get("lm_head"), tokens.TokenRows):
    return {"embed_tokens": index, "lm_head": index}
  return index or None


def names(overrides: types.Tree) -> list[str]:
  """The modules, as `modules_to_save` of PEFT names them.

  PEFT compares ends of paths as text, so that `norm` would be
  `input_layernorm` as well; `model.norm` is not.
  """
  if overrides is None:
    return []
  inner = [t for t, v in (overrides.layers or {}).items() if v is not None]
  outer = [t for t in hf.OUTER if getattr(overrides, t) is not None]
  return [hf.OUTER[t] if t == "norm" else t for t in inner + outer]


def _leaves(overrides) -> Iterator[tuple[str, Any, bool]]:
  """(name, value, whether it is a projection's weight) of every tensor."""
  for target, module in (overrides.layers or {}).items():
    for leaf, value, linear in _parts(module):
      for layer, one in enumerate(value):
        yield hf.hf_name(layer, target, leaf), np.asarray(one), linear
  for target in hf.OUTER:
    for leaf, value, linear in _parts(getattr(overrides, target)):
      yield hf.hf_name(None, target, leaf), np.asarray(value), linear


def _parts(module):
  if hasattr(module, "weight"):
    yield "weight", module.weight, True
    if module.bias is not None:
      yield "bias", module.bias, False
  elif module is not None:
    yield "weight", module, False


def is_saved(module: str, modules_to_save: Sequence[str]) -> bool:
  """PEFT's rule: whether a module's path ends in one of the names."""
  return any(module.endswith(name) for name in modules_to_save)


def saved(
    named: Mapping[str, np.ndarray], config: Mapping[str, Any], tied: bool,
    place: str) -> dict[str, np.ndarray]:
  """Those of a file's tensors that belong to modules trained whole.

  Args:
    named: without PEFT's prefix.
    config: `adapter_config.json`.
    tied: whether the model's head is its embedding.
    place: the config, for errors.

  Raises:
    errors.UserError: if one of two tied modules was trained by itself.
  """
  modules = config.get("modules_to_save") or []
  found = {
      name: value for name, value in named.items()
      if ".lora_" not in name and is_saved(name.rpartition(".")[0], modules)}
  for module in modules:
    if not any(is_saved(name.rpartition(".")[0], [module]) for name in found):
      raise errors.UserError(
          f"{place}: modules_to_save={list(modules)}, but the file holds no "
          f"tensor of {module}; save the adapter again")
  if tied and not config.get("ensure_weight_tying") and (
      EMBEDDING in found or HEAD in found):
    raise errors.UserError(
        f"{place}: modules_to_save={modules} trained embed_tokens or "
        "lm_head apart from the other, to which this model ties it, and "
        "ensure_weight_tying is false; merge the adapter with PEFT and use "
        "the merged model")
  return found


def rows(
    named: Mapping[str, np.ndarray], config: Mapping[str, Any], tied: bool,
    place: str) -> tuple[dict[str, Any], set[str]]:
  """(trainable rows of the embedding and the head, their tensors' names).

  Args:
    named, config, tied, place: see `saved`.

  Raises:
    errors.UserError: if the config's indices and the tensors do not agree.
  """
  given = config.get("trainable_token_indices")
  found: dict[str, Any] = {}
  used = {name for name in named
          if tied and name == f"{hf.OUTER['lm_head']}.{ROWS}"}
  if given is None:
    return found, set()
  by_name = given if isinstance(given, dict) else {"embed_tokens": given}
  for name, indices in by_name.items():
    target = next((t for t in OUTER if name.endswith(t)), None)
    if target == "lm_head" and tied and "embed_tokens" in found and (
        list(indices) == list(by_name.get("embed_tokens", ()))):
      continue  # One matrix: the rows follow.
    path = f"{hf.OUTER.get(target or '', name)}.{ROWS}"
    values = named.get(path)
    if target is None or values is None or len(values) != len(indices):
      raise errors.UserError(
          f"{place}: trainable_token_indices={given!r}, but the file "
          f"holds no {ROWS} of {len(indices)} rows for {name}; save the "
          "adapter again")
    order = np.argsort(indices)
    found[target] = tokens.TokenRows(
        rows=np.asarray(values, np.float32)[order],
        index=np.asarray(indices, np.int32)[order], head=target == "lm_head")
    used.add(path)
  return found, used


def overrides(
    model: config_lib.ModelConfig, base: types.Tree,
    modules_to_save: Sequence[str], named: Mapping[str, np.ndarray],
    place: str
) -> tuple[tuple[str, ...], types.Tree | None]:
  """(targets, partial base) of a file's tensors; inverse of `tensors`.

  Args:
    model: the architecture.
    base: a base of its structure.
    modules_to_save: of `adapter_config.json`.
    named: the tensors, without PEFT's prefix.
    place: the file, for errors.

  Raises:
    errors.UserError: if one is missing, or has another shape.
  """
  if not modules_to_save:
    return (), None
  targets: list[str] = []
  layers: dict[str, Any] = dict.fromkeys(base.layers)
  outer: dict[str, Any] = dict.fromkeys(hf.OUTER)
  for slot in hf.slots(model):
    depth = range(model.n_layers) if slot.stacked else (None,)
    paths = [hf.hf_name(layer, slot.target, slot.leaf) for layer in depth]
    if not is_saved(paths[0].rpartition(".")[0], modules_to_save):
      continue
    values = []
    for path in paths:
      value = named.get(path)
      if value is None or value.shape != slot.shape:
        found = "is missing" if value is None else f"has {value.shape}"
        raise errors.UserError(
            f"{place}: modules_to_save={list(modules_to_save)} needs {path} of "
            f"shape {slot.shape}, which {found}; the adapter was made for "
            "another base, or saved in part")
      values.append(value.T if slot.linear else value)
    array = jnp.asarray(
        np.stack(values) if slot.stacked else values[0], jnp.float32)
    where = layers if slot.stacked else outer
    if slot.target in targets:
      where[slot.target] = where[slot.target].replace(bias=array)
      continue
    if slot.stacked and model.layer_order:
      raise errors.UserError(
          f"{place}: modules_to_save={list(modules_to_save)} trained copies "
          f"of {slot.target} in layers that share their weights here; merge "
          "the adapter with PEFT and use the merged model")
    targets.append(slot.target)
    like = base.layers[slot.target] if slot.stacked else getattr(
        base, slot.target)
    where[slot.target] = (
        like.replace(weight=array, bias=None) if slot.linear else array)
  return tuple(targets), base.replace(
      layers=layers if any(v is not None for v in layers.values()) else None,
      **outer)
