"""Adapters of other ranks than they were trained with.

What a method or a pruning keeps of each module becomes a tree of that size,
padded or cut into runs as a new one is:

  kept {"...layers.0.self_attn.q_proj": [5, 0]}   A[:, [5, 0]], B[[5, 0]]

and a config whose patterns say so, with which PEFT makes modules of the same
ranks and scales.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import errors
from lora_jax import mesh as mesh_lib
from lora_jax.adapters import assemble
from lora_jax.adapters import base
from lora_jax.adapters import config as config_lib
from lora_jax.adapters import registry
from lora_jax.adapters import runs

Paths = Mapping[str, Sequence[str]]


def resize(
    adapters: base.Adapters, kept: Mapping[str, Sequence[int]], paths: Paths,
    shapes: Mapping[str, Sequence[int]]
) -> base.Adapters:
  """Adapters with only these of their ranks; scales stay as they are.

  Args:
    adapters: whole tree, of LoRA's kind.
    kept: by module path, the numbers of the ranks that stay, in their new
      order; none of them, and the module is not adapted any more. Modules
      that it does not name stay as they are.
    paths: module paths by target.
    shapes: `(i, o)` by target.

  Raises:
    errors.UserError: if a path is not adapted, or a number is no rank of it.
  """
  whole = jax.tree.map(mesh_lib.fetch, adapters)
  placed = assemble.placements(whole)
  chosen = {
      name: [_chosen(path, rank, kept) for path, rank in zip(
          paths[name], found.rank.tolist(), strict=True)]
      for name, found in placed.items()}
  adapted = {path for name, found in placed.items() for path, rank in zip(
      paths[name], found.rank, strict=True) if rank}
  for path in kept:
    if path not in adapted:
      raise errors.UserError(
          f'"{path}" is not adapted{errors.nearest(path, adapted)}')
  ranks = {name: [len(index) for index in chosen[name]]
           for name in whole.layers}
  ends = runs.plan(
      ranks, {n: sum(shapes[n]) for n in ranks}) if ranks else ()

  def stack(name, start, stop):
    width = max(ranks[name][start:stop])
    if not width:
      return None
    found = []
    like, *_ = next(runs.each(whole.layers[name]))
    for layer in range(start, stop):
      module, row = runs.at(whole.layers[name], layer)
      if module is None:  # Any module, of which nothing is kept.
        module, row = like, 0
      one = jax.tree.map(lambda x: x[row], module)  # noqa: B023
      found.append(one.resized(chosen[name][layer], width))
    return jax.tree.map(lambda *x: jnp.stack(x), *found)

  layers = {
      name: runs.joined([stack(name, *span) for span in runs.spans(ends)], ends)
      for name in whole.layers if any(ranks[name])}
  outer = {name: one.resized(chosen[name][0], len(chosen[name][0]))
           if name in chosen else one
           for name, one in whole.outer.items()
           if name not in chosen or chosen[name][0]}
  return jax.tree.map(jnp.asarray, dataclasses.replace(
      whole, layers=layers, outer=outer))


def _chosen(path, rank, kept) -> list[int]:
  index = [int(n) for n in kept.get(path, range(rank))]
  if len(set(index)) < len(index) or not all(0 <= n < rank for n in index):
    raise errors.UserError(
        f'"{path}" has ranks 0 to {rank - 1}, each of which can be kept once; '
        f"not {index}")
  return index


def described(
    config: config_lib.AdapterConfig, adapters: base.Adapters, paths: Paths
) -> config_lib.AdapterConfig:
  """The config with patterns and targets as its adapters are.

  Args:
    config: what the adapters were made from.
    adapters: whole tree.
    paths: module paths by target.
  """
  row, config = registry.method(config.method), registry.checked(config)
  ranks: dict[str, dict[str, int]] = {}
  alphas: dict[str, dict[str, float]] = {}
  for name, placed in assemble.placements(adapters).items():
    for path, rank, scale in zip(
        paths[name], placed.rank.tolist(), placed.scale, strict=True):
      if rank:
        ranks.setdefault(name, {})[path] = rank
        # Scales are proportional to alpha.
        alphas.setdefault(name, {})[path] = _alpha(
            scale, row.scale(1.0, rank, config.options))
  return dataclasses.replace(
      config, layers=None,
      targets=tuple(path for group in ranks.values() for path in group),
      rank_pattern=_pattern(ranks, config.rank),
      alpha_pattern=_pattern(alphas, config.alpha))


def _alpha(scale: np.float32, unit: float) -> float:
  """An alpha of which `unit` each make the scale; the shortest such number."""
  exact = float(scale) / unit
  short = float(str(np.float32(exact)))
  return short if np.float32(short * unit) == scale else exact


def _pattern(values: Mapping[str, Mapping[str, Any]], default) -> dict:
  """By target where all its modules have one value, else by path."""
  found: dict[str, Any] = {}
  for name, group in values.items():
    if len(set(group.values())) == 1:
      value = next(iter(group.values()))
      found |= {name: value} if value != default else {}
    else:
      found |= {p: v for p, v in group.items() if v != default}
  return found
