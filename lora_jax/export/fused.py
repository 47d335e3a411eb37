"""Adapters of fused projections, as Hugging Face PEFT has them.

Phi-3 in transformers has one `qkv_proj` where this code has q, k and v. LoRAs
of the parts are one LoRA of the whole, of rank r_q + r_k + r_v:

  [x A_q B_q | x A_k B_k | x A_v B_v] = x [A_q A_k A_v] diag(B_q, B_k, B_v)

whose alpha keeps the scale of the parts (where theirs differ, B takes up the
ratio); DoRA's magnitudes, one an output, lie one after the other. The other
way, a LoRA of the whole is one of each part, with A copied and its own rows
of PEFT's B. Both ways are exact.

A file written here says in its metadata which ranks are whose, so that it is
read as what it was. One that PEFT wrote says nothing: its parts share A, and
as long as they do they are written as one LoRA of rank r again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
import json
import math
from typing import Any

import numpy as np

from lora_jax import errors
from lora_jax.adapters import config as config_lib

PREFIX = "base_model.model."
# Metadata key: ranks of the parts, by module name or path, as JSON.
BLOCKS = "lora_jax.blocks"
# PEFT's tensors of a module that can be cut and joined.
DOWN, UP, MAGNITUDE = (
    "lora_A.weight", "lora_B.weight", "lora_magnitude_vector")

Tensors = dict[str, np.ndarray]
# Path of a fused module -> path of each part -> its outputs, in order.
Fused = Mapping[str, Mapping[str, int]]


def join(
    named: Tensors,
    config: Mapping[str, Any],
    fused: Fused,
    paths: Mapping[str, Sequence[str]],
    exact: bool = False,
) -> tuple[Tensors, dict[str, Any], dict[str, str]]:
  """From an adapter of the parts to one of the fused modules.

  Args:
    named: PEFT's tensors by name.
    config: `adapter_config.json`.
    fused: the model's fused modules; see `hf.fused_modules`.
    paths: the model's module paths by target, the parts' among them.
    exact: whether `split` must give every bit back.

  Returns:
    Tensors, config, and metadata for the file.

  Raises:
    errors.UserError: if DoRA adapts some parts only, or a tensor of the
      method is not one that can be joined, or not exactly.
  """
  if not fused:
    return named, dict(config), {}
  modules, alphas = _modules(named), {}
  blocks: dict[str, list[int]] = {}
  for whole, sizes in fused.items():
    saved = [p for p in sizes if f"{PREFIX}{p}.weight" in modules]
    if saved:
      raise errors.UserError(
          f"adapter.modules_to_save: PEFT has {_last(whole)}, and no "
          f"{_last(saved[0])} of its own; use --format=hf")
    parts = {p: modules.pop(p) for p in sizes if p in modules}
    if not parts:
      continue
    for path, tensors in parts.items():
      _check(path, tensors)
    if len(parts) < len(sizes) and any(MAGNITUDE in t for t in parts.values()):
      missing = next(p for p in sizes if p not in parts)
      raise errors.UserError(
          f"{whole}: PEFT has DoRA on the whole module only, and {missing} is "
          f"not adapted; adapt {', '.join(map(_last, sizes))} together, or "
          "use --format=hf")
    scales = {p: _alpha(config, p) / _divisor(config, len(t[DOWN]))
              for p, t in parts.items()}
    if exact and len(set(scales.values())) > 1:
      raise errors.UserError(
          f"{whole}: alpha / r differs among its parts, and PEFT has one of "
          "the whole; what adapter.init made of rows would be rounded: give "
          "them one, or use --format=hf or another adapter.init")
    ranks = [len(parts[p][DOWN]) if p in parts else 0 for p in sizes]
    scale = next(iter(scales.values()))
    if _shared(list(parts.values()), list(scales.values()), len(sizes)):
      first = next(iter(parts.values()))
      modules[whole] = {
          DOWN: first[DOWN],
          UP: np.concatenate([t[UP] for t in parts.values()])}
    else:
      blocks[whole] = ranks
      modules[whole] = _diagonal(parts, sizes, ranks, {
          p: np.float32(s / scale) for p, s in scales.items()})
    if MAGNITUDE in next(iter(parts.values())):
      modules[whole][MAGNITUDE] = np.concatenate(
          [t[MAGNITUDE] for t in parts.values()])
    alphas[whole] = scale * _divisor(config, len(modules[whole][DOWN]))
  whole_of = {p: whole for whole, sizes in fused.items() for p in sizes}
  known = {whole_of.get(p, p) for group in paths.values() for p in group}
  metadata = {BLOCKS: json.dumps(_pattern(blocks), sort_keys=True)}
  return (_named(modules), _config(config, modules, alphas, known),
          metadata if blocks else {})


def refuse(adapted: Collection[str], fused: Fused) -> None:
  """Raises if parts of fused modules are adapted by what cannot be joined.

  Args:
    adapted: module paths.
    fused: see `join`.

  Raises:
    errors.UserError: names the first.
  """
  for whole, sizes in fused.items():
    for path in sizes:
      if path in adapted:
        raise errors.UserError(
            f"{path}: PEFT has this method on {_last(whole)} only, and what "
            "was trained on its parts cannot be joined to one; use "
            "--format=hf, or adapt other modules")


def split(
    named: Tensors,
    config: Mapping[str, Any],
    fused: Fused,
    paths: Mapping[str, Sequence[str]],
    metadata: Mapping[str, str],
    source: str,
) -> tuple[Tensors, dict[str, Any]]:
  """Inverse of `join`; also of adapters that were not made by it.

  Args:
    named: PEFT's tensors by name.
    config: `adapter_config.json`.
    fused: the model's fused modules.
    paths: the model's module paths by target.
    metadata: of the file.
    source: the file's path, for messages.

  Returns:
    Tensors and config of an adapter of the parts.

  Raises:
    errors.UserError: if a fused module's tensors do not fit the model.
  """
  if not fused:
    return named, dict(config)
  modules, alphas = _modules(named), {}
  blocks = json.loads(metadata.get(BLOCKS, "{}"))
  for whole, sizes in fused.items():
    tensors = modules.pop(whole, None)
    if tensors is None:
      continue
    _fits(whole, tensors, sum(sizes.values()), source)
    down, up = tensors[DOWN], tensors[UP]
    scale = _alpha(config, whole) / _divisor(config, len(down))
    ranks = config_lib.by_pattern(whole, blocks, None)
    ends = np.cumsum(list(sizes.values()))
    for i, (path, size) in enumerate(sizes.items()):
      rows = slice(ends[i] - size, ends[i])
      own = slice(0, len(down))
      if ranks is not None and _is_diagonal(up, list(sizes.values()), ranks):
        own = slice(sum(ranks[:i]), sum(ranks[:i + 1]))
      if own.start == own.stop:
        continue
      modules[path] = {DOWN: down[own], UP: up[rows, own]}
      if MAGNITUDE in tensors:
        modules[path][MAGNITUDE] = tensors[MAGNITUDE][rows]
      alphas[path] = scale * _divisor(config, own.stop - own.start)
  known = {p for group in paths.values() for p in group}
  return _named(modules), _config(config, modules, alphas, known)


def _modules(named: Tensors) -> dict[str, Tensors]:
  """Tensors by module path and suffix; by name those that are no LoRA's."""
  modules: dict[str, Tensors] = {}
  for name, value in named.items():
    path, dot, suffix = name.removeprefix(PREFIX).partition(".lora_")
    if dot:
      modules.setdefault(path, {})["lora_" + suffix] = value
    else:
      modules[name] = {"": value}
  return modules


def _named(modules: Mapping[str, Tensors]) -> Tensors:
  return {
      f"{PREFIX}{path}.{suffix}" if suffix else path: value
      for path, tensors in modules.items()
      for suffix, value in tensors.items()}


def _check(path: str, tensors: Tensors) -> None:
  unknown = set(tensors) - {DOWN, UP, MAGNITUDE}
  if unknown or DOWN not in tensors or UP not in tensors:
    raise errors.UserError(
        f"{path}: PEFT has this method on the fused module only, and "
        f"{min(unknown, default='what there is')} cannot be joined to one; "
        "use --format=hf")


def _fits(path: str, tensors: Tensors, outputs: int, source: str) -> None:
  """Refuses a fused module's tensors that are not of this model."""
  down, up = tensors.get(DOWN), tensors.get(UP)
  if down is None or up is None or down.ndim != 2:
    raise errors.UserError(
        f"{source}: {path} has no lora_A or no lora_B; save the adapter again")
  expected = {DOWN: down.shape, UP: (outputs, len(down))}
  if MAGNITUDE in tensors:
    expected[MAGNITUDE] = (outputs,)
  for suffix in sorted(tensors):
    if tensors[suffix].shape != expected.get(suffix):
      raise errors.UserError(
          f"{source}: {path}.{suffix} has shape {tensors[suffix].shape}, this "
          f"model needs {expected.get(suffix)}; the adapter was made for "
          "another base")


def _shared(parts: list[Tensors], scales: list[float], n: int) -> bool:
  """Whether every part has one A and one scale, as after `split`."""
  return len(parts) == n and len(set(scales)) == 1 and all(
      np.array_equal(parts[0][DOWN], t[DOWN]) for t in parts[1:])


def _diagonal(parts, sizes, ranks, ratios) -> Tensors:
  up = np.zeros((sum(sizes.values()), sum(ranks)), np.float32)
  row = column = 0
  for (path, size), rank in zip(sizes.items(), ranks, strict=True):
    if path in parts:
      up[row:row + size, column:column + rank] = (
          ratios[path] * parts[path][UP])
    row, column = row + size, column + rank
  return {DOWN: np.concatenate([t[DOWN] for t in parts.values()]), UP: up}


def _is_diagonal(up: np.ndarray, sizes: list[int], ranks: list[int]) -> bool:
  """Whether B still is what `_diagonal` made: PEFT may have trained it."""
  if len(ranks) != len(sizes) or sum(ranks) != up.shape[1]:
    return False
  row_part = np.repeat(np.arange(len(sizes)), sizes)
  column_part = np.repeat(np.arange(len(ranks)), ranks)
  return not up[row_part[:, None] != column_part].any()


def _alpha(config: Mapping[str, Any], path: str) -> float:
  return config_lib.by_pattern(
      path, config.get("alpha_pattern") or {}, config["lora_alpha"])


def _divisor(config: Mapping[str, Any], rank: int) -> float:
  """What alpha is divided by to give the scale."""
  return math.sqrt(rank) if config.get("use_rslora") else rank


def _config(config, modules, alphas, known) -> dict[str, Any]:
  """The config, for other modules than it was written for.

  Patterns are resolved: every key stands for modules that no other matches.
  """
  adapted = {
      path: next(len(t[s]) for s in (DOWN, "lora_embedding_A") if s in t)
      for path, t in modules.items() if {DOWN, "lora_embedding_A"} & set(t)}
  alphas = {p: alphas.get(p, _alpha(config, p)) for p in adapted}
  alphas = {p: int(a) if float(a).is_integer() else a
            for p, a in alphas.items()}
  targets = []
  for name, group in _by_name(adapted).items():
    everywhere = {p for p in known if _last(p) == name}
    targets += [name] if set(group) == everywhere else list(group)
  return dict(config) | {
      "rank_pattern": _pattern(adapted, config["r"]),
      "alpha_pattern": _pattern(alphas, config["lora_alpha"]),
      "target_modules": sorted(targets)}


def _pattern(values: Mapping[str, Any], default: Any = None) -> dict[str, Any]:
  """Values by module name where all modules of it have one, else by path."""
  found: dict[str, Any] = {}
  for name, group in _by_name(values).items():
    first, *others = group.values()
    if all(value == first for value in others):
      found |= {name: first} if first != default else {}
    else:
      found |= {p: v for p, v in group.items() if v != default}
  return found


def _by_name(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  groups: dict[str, dict[str, Any]] = {}
  for path, value in values.items():
    groups.setdefault(_last(path), {})[path] = value
  return groups


def _last(path: str) -> str:
  return path.rpartition(".")[2]
