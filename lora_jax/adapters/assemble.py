"""How a whole adapter tree is built from a config."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
from typing import Any
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import errors
from lora_jax import types
from lora_jax.adapters import base
from lora_jax.adapters import config as config_lib
from lora_jax.adapters import hybrid
from lora_jax.adapters import method as method_lib
from lora_jax.adapters import partition
from lora_jax.adapters import registry
from lora_jax.adapters import runs
from lora_jax.adapters import saved
from lora_jax.adapters import several
from lora_jax.adapters import starts
from lora_jax.adapters import targets
from lora_jax.adapters import tokens


@dataclasses.dataclass(frozen=True)
class Placement:
  """Ranks and scales of one target's modules, one entry a layer."""

  rank: np.ndarray  # int32, 0 where a layer is not adapted
  scale: np.ndarray  # float32
  rate: np.ndarray  # float32

  @property
  def width(self) -> int:
    return int(self.rank.max())

  def frozen(self) -> dict[str, np.ndarray]:
    return {"rank": self.rank, "scale": self.scale, "rate": self.rate}


def place(
    config: config_lib.AdapterConfig, paths: Mapping[str, Sequence[str]]
) -> dict[str, Placement]:
  """Which modules are adapted, at which rank and scale.

  Args:
    config: the adapter block.
    paths: module paths by target (see `targets.select`).

  Returns:
    A placement for each target that is adapted.

  Raises:
    errors.UsageError: for an unknown method, target or pattern, or a bad
      value.
  """
  row = registry.method(config.method)
  config = registry.checked(config)
  chosen = targets.select(
      targets.open_to(paths, row, config.method), registry.targets(config),
      config.layers)
  adapted = [path for name, flags in chosen.items()
             for path, flag in zip(paths[name], flags, strict=True) if flag]
  for field in ("rank_pattern", "alpha_pattern"):
    if getattr(config, field) and not row.patterns:
      raise errors.UsageError(
          f"adapter.{field}: adapter.method={config.method} has one rank for "
          "all modules, or none; leave it empty")
    for key in getattr(config, field):
      if not any(config_lib.by_pattern(p, {key: True}, False)
                 for p in adapted):
        raise errors.UsageError(
            f'adapter.{field}: "{key}" matches no adapted module'
            f"{errors.nearest(key, chosen)}")
  placements = {}
  for name, flags in chosen.items():
    ranks, scales = [], []
    for path, flag in zip(paths[name], flags, strict=True):
      r = config_lib.by_pattern(path, config.rank_pattern, config.rank)
      r = r if row.ranked else 1
      alpha = config_lib.by_pattern(path, config.alpha_pattern, config.alpha)
      ranks.append(r if flag else 0)
      scales.append(row.scale(alpha, r, config.options) if flag else 0.0)
    placements[name] = Placement(
        np.asarray(ranks, np.int32), np.asarray(scales, np.float32),
        np.full(len(ranks), config.dropout, np.float32))
  return placements


def placements(adapters: base.Adapters) -> dict[str, Placement]:
  """`place`'s answer for adapters that are there."""
  outer = {name: jax.tree.map(lambda x: x[None], one)
           for name, one in adapters.outer.items() if hasattr(one, "rank")}
  return {name: Placement(*(
      runs.values(one, field) for field in ("rank", "scale", "rate")))
          for name, one in {**adapters.layers, **outer}.items()}


def build(
    key: jax.Array,
    config: hybrid.Configs,
    tree: types.Tree,
    paths: Mapping[str, Sequence[str]],
    originals: starts.Originals | None = None,
    donate: bool = False,
    geometry: base.Geometry | None = None,
    stats: Mapping[str, Any] | None = None,
    order: Sequence[int] = (),
) -> tuple[types.Tree, base.Adapters]:
  """(base, adapters) for a config: the start of a run.

  Args:
    key: PRNG key; each module folds in its target and layer.
    config: the adapter block; or several, the innermost first, for adapters
      as in `several`.
    tree: the base: `layers[target].weight` stacked, `embed_tokens`, `lm_head`.
    paths: module paths by target, outer ones (`embed_tokens`, `lm_head`) too.
    originals: see `starts.replace`.
    donate: see `starts.replace`.
    geometry: the model's sizes; methods that adapt no projection need them.
    stats: (A, B) by target, stacked, that an informed start made of rows; see
      `train.statistics`; of several parts for the first.
    order: see `partition.prepared`; of one part only.

  Returns:
    The base, perhaps with weights replaced or removed, and the adapters.

  Raises:
    errors.UsageError: see `place`, `starts.replace` and `hybrid`.
  """
  if isinstance(config, config_lib.AdapterConfig):
    return _one(key, config, tree, paths, originals, donate, geometry, stats,
                order=order)
  configs = hybrid.by_name(config)
  hybrid.alone(configs)
  found: dict[str, base.Adapters] = {}
  for name, part in configs.items():
    with hybrid.named(name if found else None):
      hybrid.check(part, place(part, paths), found,
                   next(iter(configs.values())).modules_to_save)
      # The first starts as it would alone.
      own = jax.random.fold_in(key, _digest(name)) if found else key
      tree, found[name] = _one(
          own, part, tree, paths, originals, donate, geometry,
          None if found else stats, several.joined(found) if found else None,
          whole=True)
  return tree, partition.beside(several.joined(found), tree)


def _one(key, config, tree, paths, originals, donate, geometry, stats,
         below=None, whole=False, order=()):
  """`build` of one method, on what the parts `below` leave of the base."""
  row = registry.method(config.method)
  if row.build is not None:
    for field in ("modules_to_save", "trainable_token_indices"):
      if getattr(config, field):
        raise errors.UsageError(
            f"adapter.{field} stands beside adapters, and adapter.method="
            f"{config.method} makes none; leave it empty, or use lora")
    return row.build(tree)
  assert row.init is not None and row.adapter is not None  # One of the two.
  config = registry.checked(config)
  start, placed = config.start(), place(config, paths)
  if "lm_head" in placed:
    head(tree)
  if start.informed is not None and stats is None:
    raise errors.UsageError(
        f"adapter.init={config.init} looks at training rows, and none were "
        "given; pass rows=..., or use adapter.init=default")
  given: Mapping[str, Any] = {}
  if start.replaces:
    tree, given = starts.replace(
        start, tree, placed, originals, donate, stats)
    stats = None
  shapes = {name: shape(tree, name) for name in placed}
  weights = {name: weight(tree, name) for name in placed}
  modules = method_lib.Modules(
      shapes, max(p.width for p in placed.values()), config.options, geometry,
      {name: placement.rank.tolist() for name, placement in placed.items()},
      weights=weights)
  numbers, turns = modules.numbers(), modules.turns()
  shared = None
  if row.share is not None:
    shared = row.share(jax.random.fold_in(key, _digest("shared")), modules)
  slots = {
      name: base.Slot(
          **placement.frozen(), given=given.get(name),
          stats=(stats or {}).get(name), number=numbers[name],
          turn=turns[name], target=name,
          bias=bias(tree, name, order) if row.adapter.of_bias else None,
          width=placement.width,
          shape=shapes[name], options=config.options, start=start,
          geometry=geometry)
      for name, placement in placed.items()}
  inner = {name: slot for name, slot in slots.items()
           if len(paths[name]) > 1 or name in tree.layers}
  ends: tuple[int, ...] = ()
  if inner:
    ranks = {n: placed[n].rank for n in inner}
    # Parts of several are stacks of all layers, which can be nested.
    ends = (len(next(iter(ranks.values()))),) if whole else cuts(
        row, ranks, shapes)
  init: Callable[..., base.Adapter] = row.init
  told = shared
  if below is not None:
    init, told = hybrid.After(init), (shared, below.shared)
    weights = hybrid.adapted(weights, below)
  layers, outer = _init(
      key, weights, {name: _by_run(slots[name], ends) for name in inner},
      {name: slot for name, slot in slots.items() if name not in inner},
      told, init=init, ends=ends, order=tuple(order))
  indices = config.trainable_token_indices
  assert not isinstance(indices, str)  # Whoever knows the tokens gives ids.
  outer |= tokens.build(tree, indices, [*outer, *config.modules_to_save])
  return tree, partition.beside(base.Adapters(
      layers=layers, outer=outer, shared=shared, overrides=saved.overrides(
          tree, config.modules_to_save, placed, bool(order))), tree, order)


def cuts(
    row: method_lib.Method, ranks: Mapping[str, Any],
    shapes: Mapping[str, Sequence[int]]
) -> tuple[int, ...]:
  """Where the stacks of a method's adapters are cut; see `runs.plan`.

  Args:
    row: of the table.
    ranks: of every layer, by stacked target.
    shapes: of a weight, by target; () where there is none.
  """
  depth = len(next(iter(ranks.values())))
  # A file that does not go by modules is made of whole stacks.
  if row.form is not None and row.form.tensors is not None:
    return (depth,)
  return runs.plan(ranks, {name: sum(shapes[name]) or 1 for name in ranks})


def _by_run(slot: base.Slot, ends: Sequence[int]) -> tuple:
  """A stacked slot as one of each run, no wider than it needs; or None."""
  if len(ends) == 1:
    return (slot,)
  found = []
  for start, stop in runs.spans(ends):
    width = int(slot.rank[start:stop].max())
    part = jax.tree.map(lambda x: x[start:stop], slot)  # noqa: B023
    found.append(dataclasses.replace(
        part, width=width, given=_trimmed(part.given, width),
        stats=_trimmed(part.stats, width)) if width else None)
  return tuple(found)


def _trimmed(given, width):
  if given is None:
    return None
  a, b = given
  return a[..., :width], b[..., :width, :]


def _digest(name: str) -> int:
  return zlib.crc32(name.encode()) & 0x7FFFFFFF


def weight(tree: types.Tree, name: str) -> types.Tree:
  """The base's weight at a place, perhaps stacked; None where it has none."""
  if name == "lm_head":
    return head(tree)
  if name == "prompt":
    return tree.embed_tokens
  holder = tree.layers.get(name, getattr(tree, name, None))
  return getattr(holder, "weight", holder)


def bias(
    tree: types.Tree, name: str, order: Sequence[int] = ()
) -> types.Array | None:
  """The base's biases at a place, `[l, o]`, of one place `[1, o]`, or None.

  Args:
    tree: the base.
    name: of the place.
    order: see `partition.prepared`.
  """
  if name in tree.layers:
    found = getattr(tree.layers[name], "bias", None)
    return found if found is None or not order else found[np.asarray(order)]
  found = getattr(getattr(tree, name, None), "bias", None)
  return None if found is None else found[None]


def shape(tree: types.Tree, name: str) -> tuple[int, ...]:
  """Of one layer's weight at a place; () where it has none."""
  found = weight(tree, name)
  if found is None or name == "prompt":
    return ()
  return tuple(found.shape[1 if name in tree.layers else 0:])


def head(tree: types.Tree) -> types.Tree:
  """The weight of an untied head.

  Raises:
    errors.UsageError: if there is none.
  """
  if tree.lm_head is None:
    raise errors.UsageError(
        'adapter.targets: "lm_head" is tied to embed_tokens in this model; '
        "adapt embed_tokens instead")
  return tree.lm_head.weight


@functools.partial(jax.jit, static_argnames=("init", "ends", "order"))
def _init(key, weights, inner, outer, shared, *, init, ends, order):
  """All adapters, in one program: (by stacked target, by outer target)."""

  def stacked(key, weights, slot, start, stop):
    # One layer at a time: a dequantised stack would not fit beside the base.
    def one(carry, xs):
      layer, where, values = xs
      return carry, init(
          jax.random.fold_in(key, layer), runs.layer(weights, where), values,
          shared)

    xs = jnp.arange(start, stop), runs.order_of(order, start, stop), slot
    return jax.lax.scan(one, None, xs)[1]

  def own(name):
    return jax.random.fold_in(key, _digest(name))

  return {
      name: runs.joined([
          None if slot is None else stacked(
              own(name), weights[name], slot, *span)
          for slot, span in zip(slots, runs.spans(ends), strict=True)], ends)
      for name, slots in inner.items()
  }, {
      name: init(own(name), weights[name], jax.tree.map(lambda x: x[0], slot),
                 shared)
      for name, slot in outer.items()}
