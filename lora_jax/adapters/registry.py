"""The table of PEFT methods, and how a whole adapter tree is built.

Adding a projection method: one file with an `Adapter` and its `init`, one row
here, one test of its formula. The contract tests pick it up from this table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
from typing import Any
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import errors
from lora_jax import host as host_lib
from lora_jax import types
from lora_jax.adapters import base
from lora_jax.adapters import config as config_lib
from lora_jax.adapters import dora
from lora_jax.adapters import full
from lora_jax.adapters import lora
from lora_jax.adapters import saved
from lora_jax.adapters import starts
from lora_jax.adapters import targets
from lora_jax.adapters import tokens


@dataclasses.dataclass(frozen=True)
class Method:
  """A row of the table.

  Attributes:
    summary: the equation and the paper, for the docs.
    adapter: the projection adapter's type, or None.
    init: `(key, weight, width, frozen, embedding, draw, given) -> adapter` of
      one module; see `lora.init`.
    scale: s as a function of alpha and r.
    identity_at_init: whether h(x) = x W0 before the first step.
    peft_config: the keys this method adds to PEFT's `adapter_config.json`.
    build: for methods that are not projections: `(base) -> (base, adapters)`.
  """

  summary: str
  adapter: type[base.Adapter] | None = None
  init: Callable | None = None
  scale: Callable[[float, int], float] = lambda alpha, r: alpha / r
  identity_at_init: bool = True
  peft_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  build: Callable | None = None


METHODS: dict[str, Method] = {
    "none": Method(
        summary="h = x W0; nothing is trained",
        build=full.build_none),
    "full": Method(
        summary="h = x W; every parameter is trained",
        build=full.build_full),
    "lora": Method(
        summary="h = x W0 + (alpha/r) x A B (arXiv 2106.09685)",
        adapter=lora.LoRA, init=lora.init),
    "rslora": Method(
        summary="h = x W0 + (alpha/sqrt(r)) x A B (arXiv 2312.03732)",
        adapter=lora.LoRA, init=lora.init,
        scale=lambda alpha, r: alpha / math.sqrt(r),
        peft_config={"use_rslora": True}),
    "dora": Method(
        summary="h = m/||W0 + sAB|| x (W0 + sAB) (arXiv 2402.09353)",
        adapter=dora.DoRA, init=dora.init,
        peft_config={"use_dora": True}),
}


def method(name: str) -> Method:
  """The row of `name`, or a `UsageError` that names the nearest one."""
  return errors.choose("adapter.method", name, METHODS)


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
  row = method(config.method)
  config.validate()
  chosen = targets.select(paths, config.targets, config.layers)
  adapted = [path for name, flags in chosen.items()
             for path, flag in zip(paths[name], flags, strict=True) if flag]
  for field in ("rank_pattern", "alpha_pattern"):
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
      alpha = config_lib.by_pattern(path, config.alpha_pattern, config.alpha)
      ranks.append(r if flag else 0)
      scales.append(row.scale(alpha, r) if flag else 0.0)
    placements[name] = Placement(
        np.asarray(ranks, np.int32), np.asarray(scales, np.float32),
        np.full(len(ranks), config.dropout, np.float32))
  return placements


def placements(adapters: base.Adapters) -> dict[str, Placement]:
  """`place`'s answer for adapters that are there."""
  both = jax.device_get({**adapters.layers, **adapters.outer})
  return {name: Placement(*map(np.atleast_1d, (a.rank, a.scale, a.rate)))
          for name, a in both.items() if hasattr(a, "rank")}


def build(
    key: jax.Array,
    config: config_lib.AdapterConfig,
    tree: types.Tree,
    paths: Mapping[str, Sequence[str]],
    originals: starts.Originals | None = None,
    donate: bool = False,
) -> tuple[types.Tree, base.Adapters]:
  """(base, adapters) for a config: the start of a run.

  Args:
    key: PRNG key; each module folds in its target and layer.
    config: the adapter block.
    tree: the base: `layers[target].weight` stacked, `embed_tokens`, `lm_head`.
    paths: module paths by target, outer ones (`embed_tokens`, `lm_head`) too.
    originals: see `starts.replace`.
    donate: see `starts.replace`.

  Returns:
    The base, perhaps with weights replaced or removed, and the adapters.

  Raises:
    errors.UsageError: see `place` and `starts.replace`.
  """
  row = method(config.method)
  if row.build is not None:
    for field in ("modules_to_save", "trainable_token_indices"):
      if getattr(config, field):
        raise errors.UsageError(
            f"adapter.{field} stands beside adapters, and adapter.method="
            f"{config.method} makes none; leave it empty, or use lora")
    return row.build(tree)
  assert row.init is not None  # A row has one of the two.
  start, placements = config.start(), place(config, paths)
  if "lm_head" in placements:
    _head(tree)
  given: Mapping[str, Any] = {}
  if start.decompose is not None:
    tree, given = starts.replace(start, tree, placements, originals, donate)
  layers, outer = {}, {}
  for name, placement in placements.items():
    subkey = jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)
    frozen = placement.frozen()
    if name in tree.layers:
      layers[name] = _init_stacked(row.init, placement.width, start.draw)(
          subkey, tree.layers[name].weight, frozen, given.get(name))
    else:
      one = {k: jnp.asarray(v[0]) for k, v in frozen.items()}
      embedding = name == "embed_tokens"
      weight = tree.embed_tokens if embedding else _head(tree)
      outer[name] = row.init(
          subkey, weight, placement.width, one, embedding, start.draw,
          jax.tree.map(lambda x: x[0], given.get(name)))
  indices = config.trainable_token_indices
  assert not isinstance(indices, str)  # Whoever knows the tokens gives ids.
  outer |= tokens.build(tree, indices, [*outer, *config.modules_to_save])
  return tree, base.beside(base.Adapters(
      layers=layers, outer=outer, overrides=saved.overrides(
          tree, config.modules_to_save, placements)), tree)


def _head(tree):
  if tree.lm_head is None:
    raise errors.UsageError(
        'adapter.targets: "lm_head" is tied to embed_tokens in this model; '
        "adapt embed_tokens instead")
  return tree.lm_head.weight


def _init_stacked(init, width, draw):
  # One layer at a time: a dequantised stack would not fit beside the base.
  def run(key, weight, frozen, given):
    depth = frozen["rank"].shape[0]

    def one(carry, xs):
      layer, w, values, pair = xs
      return carry, init(
          jax.random.fold_in(key, layer), host_lib.on_device(w), width, values,
          draw=draw, given=pair)

    return jax.lax.scan(
        one, None, (jnp.arange(depth), weight, frozen, given))[1]

  return jax.jit(run)
