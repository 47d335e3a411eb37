"""Writing an adapter folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np

from lora_jax import errors
from lora_jax import mesh as mesh_lib
from lora_jax import processes
from lora_jax.adapters import assemble
from lora_jax.adapters import base as base_lib
from lora_jax.adapters import config as config_lib
from lora_jax.adapters import method as method_lib
from lora_jax.adapters import partition
from lora_jax.adapters import registry
from lora_jax.export import folders
from lora_jax.export import fused as fused_lib
from lora_jax.export import tensors as tensors_lib
from lora_jax.export import whole
from lora_jax.export.peft import names as names_lib
from lora_jax.models import hub


def peft_config(
    config: config_lib.AdapterConfig,
    adapters: base_lib.Adapters,
    paths: Mapping[str, Sequence[str]],
    base_name: str | None = None,
) -> dict[str, Any]:
  """`adapter_config.json` for an adapter of ours.

  A target that is adapted in every layer is named by itself, one that is not
  by the full paths of its modules.
  """
  row = registry.method(config.method)
  config = registry.checked(config)
  names = []
  for target, ranks in _ranks(adapters).items():
    if all(ranks):
      names.append(target)
    else:
      names += [p for p, r in zip(paths[target], ranks, strict=True) if r]
  whole_names = whole.names(adapters.overrides)
  base, revision = hub.split(base_name or "") or (base_name, None)
  found: dict[str, Any] = {
      "peft_type": row.form and row.form.peft_type,
      "task_type": "CAUSAL_LM",
      "base_model_name_or_path": base,
      **({"revision": revision} if revision else {}),
      "inference_mode": True,
  }
  if row.form is None:
    return found | ({names_lib.OWN: _block(config)} if row.adapter else {})
  if row.form.lists_targets:
    found["target_modules"] = sorted(names)
    found["modules_to_save"] = whole_names or None
  if row.form.places is not None:
    found |= row.form.places(_ranks(adapters))
  indices = whole.token_indices(adapters)
  if row.form.peft_type == "LORA" or indices:
    found |= {
        "trainable_token_indices": indices,
        "ensure_weight_tying": (
            "embed_tokens" in whole_names and "lm_head" not in paths)}
  return found | row.form.config(config)


def with_dropout(
    text: Mapping[str, Any], config: config_lib.AdapterConfig
) -> dict[str, Any]:
  """`adapter_config.json` with the rate of dropout of a config."""
  if names_lib.OWN in text:
    return dict(text) | {
        names_lib.OWN: text[names_lib.OWN] | {"dropout": config.dropout}}
  form = registry.method(config.method).form
  own = {} if form is None else form.config(registry.checked(config))
  return dict(text) | {
      k: v for k, v in own.items() if k.endswith("dropout")}


def _block(config: config_lib.AdapterConfig) -> dict[str, Any]:
  """The adapter block as JSON keeps it."""
  return json.loads(json.dumps(dataclasses.asdict(config)))


def tensors(
    adapters: base_lib.Adapters, paths: Mapping[str, Sequence[str]],
    form: method_lib.Form | None = None,
) -> dict[str, np.ndarray]:
  """The file's tensors by name: float32, and indices.

  Args:
    adapters: whole tree.
    paths: module paths by target.
    form: the method's, if it has one.
  """
  host = jax.device_get(adapters)
  if form is not None and form.tensors is not None:
    found = dict(form.tensors(host))
  else:
    found = {}
    for target, ranks in _ranks(host).items():
      stacked = target in host.layers
      for layer, rank in enumerate(ranks):
        if not rank:
          continue
        module = partition.module(host, target, layer if stacked else None)
        assert module is not None
        for suffix, value in module.to_peft(target == "embed_tokens").items():
          path = f"{names_lib.PREFIX}{paths[target][layer]}"
          found[f"{path}.{suffix}"] = value
    for one in jax.tree.leaves(host.shared, is_leaf=partition.is_adapter):
      found |= {f"{names_lib.SHARED}{name}": value
                for name, value in one.to_peft().items()}
  saved = whole.tensors(host, tied="lm_head" not in paths)
  found |= {f"{names_lib.PREFIX}{name}": x for name, x in saved.items()}
  return {name: _stored(value) for name, value in found.items()}


def _stored(value) -> np.ndarray:
  value = np.asarray(value)
  if np.issubdtype(value.dtype, np.floating) or value.dtype.name == "bfloat16":
    value = value.astype(np.float32)
  # ascontiguousarray would give a scalar an axis.
  return value if value.flags.c_contiguous else np.ascontiguousarray(value)


def write(
    folder: pathlib.Path,
    adapters: base_lib.Adapters,
    config: Mapping[str, Any],
    paths: Mapping[str, Sequence[str]],
    fingerprint: str | None = None,
    fused: fused_lib.Fused | None = None,
    replaced: str | None = None,
    more: Mapping[str, np.ndarray] | None = None,
    tokenizer: Any = None,
    began: Mapping[str, Any] | None = None,
) -> None:
  """Writes an adapter folder; a folder that is there is replaced whole.

  Args:
    folder: where.
    adapters: whole tree.
    config: `adapter_config.json`, from `peft_config` or `Loaded`.
    paths: module paths by target.
    fingerprint: of the base, kept in the file's metadata.
    fused: modules that transformers has in place of several of `paths`.
    replaced: see `Loaded`; kept there, too.
    more: tensors to write beside the adapters', e.g. `whole.tables`.
    tokenizer: saved beside them, if given.
    began: of a difference, the values of `difference.BEGAN` before it was one;
      whoever reads them makes of it what it was.

  Raises:
    errors.UserError: if the method has no adapter, or the model fuses modules
      that only LoRA can be joined over, or the disk is full or not writable.
  """
  if config["peft_type"] is None and names_lib.OWN not in config:
    raise errors.UserError(
        "this method trains no adapter of its own; use --format=hf")
  _, row = names_lib.method_of(config, names_lib.CONFIG)
  metadata = {"format": "pt"}
  if fingerprint:
    metadata[names_lib.FINGERPRINT] = fingerprint
  if replaced:
    metadata[names_lib.REPLACED] = replaced
  if began:
    metadata[names_lib.BEGAN] = json.dumps(began)
  adapters = jax.tree.map(mesh_lib.fetch, adapters)
  if not processes.writes():
    return
  named = tensors(adapters, paths, row.form)
  if row.form is not None and row.form.peft_type == "LORA":
    named, config, joined = fused_lib.join(
        named, config, fused or {}, paths, exact=bool(began))
    metadata |= joined
  elif row.form is not None and row.form.split is None:
    fused_lib.refuse(
        [p for target, ranks in _ranks(adapters).items()
         for p, rank in zip(paths[target], ranks, strict=True) if rank],
        fused or {})
  parts: dict[str, Any] = {}
  if row.form is not None and row.form.split is not None:
    config, parts = row.form.split(jax.device_get(adapters), config, paths)
  named |= {f"{names_lib.PREFIX}{name}": x for name, x in (more or {}).items()}
  named = dict(sorted(named.items()))
  # Patterns keep their order: the first that matches a module counts.
  text = json.dumps(dict(sorted(config.items())), indent=2) + "\n"
  with folders.replaced(pathlib.Path(folder), names_lib.CONFIG) as fresh:
    tensors_lib.write(
        fresh / names_lib.WEIGHTS, {name: x.shape for name, x in named.items()},
        named.items(), {name: x.dtype.name for name, x in named.items()},
        metadata)
    (fresh / names_lib.CONFIG).write_text(text, encoding="utf-8")
    for path, (block, tree) in parts.items():
      own = peft_config(
          block, tree, paths, config.get("base_model_name_or_path"))
      write(fresh / path, tree, own, paths, fingerprint, fused)
    if tokenizer is not None:
      tokenizer.save_pretrained(fresh)


def _ranks(adapters) -> dict[str, list[int]]:
  return {target: placed.rank.tolist()
          for target, placed in assemble.placements(adapters).items()}
