"""What a row of the table of methods says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

import jax
import numpy as np
import optax

from lora_jax import types
from lora_jax.adapters import base
from lora_jax.adapters import config as config_lib


@dataclasses.dataclass(frozen=True)
class NoOptions:
  """Of a method that has none of its own."""


class Rule:
  """What a method adds to training; a subclass is a frozen dataclass.

  It is static, finds its own adapters in the tree, and keeps its state in the
  optimiser's, so that checkpoints hold it.
  """

  def bound(self, adapters: base.Adapters) -> Rule:
    """The rule as it is for these adapters, of which it may note what is
    static: their ranks.

    Args:
      adapters: whole tree.
    """
    del adapters
    return self

  def penalty(self, params: types.Tree) -> jax.Array | None:
    """A term of the loss, `[]` float32, or None.

    Args:
      params: the trained part of the adapters.
    """
    del params
    return None

  def wrap(
      self, inner: optax.GradientTransformation
  ) -> optax.GradientTransformation:
    """The optimiser, and what this does with the gradient or its update.

    Args:
      inner: from clipped gradients to what is added to the parameters. Beside
        `params`, the trained part of the adapters in float32, updates are
        given `frozen=`, the other part.
    """
    return inner


@dataclasses.dataclass(frozen=True)
class Modules:
  """All modules that a method adapts, as `share` is told of them.

  Attributes:
    shapes: `(i, o)` by target, in the model's order.
    width: the largest rank.
    options: the method's own dataclass.
    geometry: the model's sizes, or None where only shapes are known.
    ranks: of every layer, by target, 0 where it is not adapted.
    tensors: of every layer, by target: a file's by suffix, if there is one.
    weights: the base's, by target, those of layers stacked; none where there is
      a file. They may be traced.
  """

  shapes: Mapping[str, tuple[int, ...]]
  width: int
  options: Any
  geometry: base.Geometry | None = None
  ranks: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict)
  tensors: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
  weights: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def count(self) -> int:
    """How many are adapted."""
    return sum(rank > 0 for ranks in self.ranks.values() for rank in ranks)

  def numbers(self) -> dict[str, np.ndarray]:
    """Each adapted module's number, `[l]` int32 by target, counted as Hugging
    Face's models list them: layer by layer, the table first, the head last."""
    first, last = ("embed_tokens",), ("lm_head",)
    places = sorted(
        ((target not in first) + (target in last), layer, order, target)
        for order, (target, ranks) in enumerate(self.ranks.items())
        for layer, rank in enumerate(ranks) if rank)
    found = {t: np.zeros(len(r), np.int32) for t, r in self.ranks.items()}
    for number, (_, layer, _, target) in enumerate(places):
      found[target][layer] = number
    return found

  def turns(self) -> dict[str, np.ndarray]:
    """Likewise, each target's modules counted by themselves."""
    return {target: np.maximum(np.cumsum(np.asarray(ranks) > 0) - 1, 0).astype(
        np.int32) for target, ranks in self.ranks.items()}


@dataclasses.dataclass(frozen=True)
class Form:
  """A method in Hugging Face PEFT's files.

  Attributes:
    peft_type: of `adapter_config.json`.
    config: from the adapter block to the keys of `adapter_config.json` that
      are the method's own.
    block: inverse of `config`: fields of `AdapterConfig`, `options` among them
      as a mapping.
    requires: keys by which this row is told from others of the same type, and
      their values; True is whatever is set.
    neutral: options of PEFT that change what is computed, and the values with
      which it is what this code computes.
    same_as: the row as which these files are read, if they say nothing by
      which this one is told from it.
    lists_targets: whether `target_modules` says what is adapted.
    places: of methods for which other keys say it: `ranks by target, a list
      with an entry a layer -> keys of adapter_config.json`.
    tensors: of methods whose file does not go by modules: `adapters ->
      tensors` by whole name.
    adapters: inverse of `tensors`: `(tensors, config block, geometry) ->
      Adapters`. It raises a KeyError for what is missing.
    shared: `(tensors, config block, Modules) -> Adapters.shared`. Those of
      `Adapters.shared.to_peft()` lie beside the modules'. It raises a KeyError
      for what is missing.
    parts: of methods made of adapters with folders of their own, which their
      config names: `adapter_config.json -> paths`, one a part. `adapters` is
      then given a fourth argument, (config block, Adapters) of each.
    split: inverse of that: `(Adapters, adapter_config.json, module paths by
      target) -> (adapter_config.json, {path: (config block, Adapters)})` of
      the parts that are written into the folder.
  """

  peft_type: str
  config: Callable[[config_lib.AdapterConfig], dict[str, Any]]
  block: Callable[[Mapping[str, Any]], dict[str, Any]]
  requires: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  neutral: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
  same_as: str = ""
  lists_targets: bool = True
  places: Callable[[Mapping[str, list[int]]], dict[str, Any]] | None = None
  tensors: Callable[[base.Adapters], dict[str, Any]] | None = None
  adapters: Callable[..., base.Adapters] | None = None
  shared: Callable[..., Any] | None = None
  parts: Callable[[Mapping[str, Any]], list[str]] | None = None
  split: Callable[..., tuple[dict[str, Any], dict[str, Any]]] | None = None


def named(options: type[Any], config: Mapping[str, Any]) -> dict[str, Any]:
  """The keys of a PEFT config that a method's options are named after."""
  names = [field.name for field in dataclasses.fields(options)]
  return {name: config[name] for name in names if name in config}


def by_rank(alpha: float, r: int, options: Any) -> float:
  """LoRA's scale, alpha / r."""
  del options
  return alpha / r


@dataclasses.dataclass(frozen=True)
class Method:
  """A row of the table.

  Attributes:
    summary: the equation, with W0 `[i, o]`.
    paper: where it is from, "arXiv 2106.09685".
    adapter: the adapter's type.
    init: `(key, weight, slot, shared) -> adapter` of one place before the
      first step; weight is None where a place has none.
    kind: `slot -> adapter's type`, where that depends on the place.
    count: trainable parameters of one place, a Python expression of i, o, r,
      target, turn (its number among the adapted ones of its target), of the
      letters of `base.Geometry`, and of the options' names (or what `options`
      answers); width of a norm.
    options: the frozen dataclass of what only this method is told.
    targets: what `adapter.targets="auto"` stands for.
    sites: places that it adapts, if these are not projections.
    scale: s of alpha, r and the options.
    ranked: whether `adapter.rank` means something.
    patterns: whether ranks may differ from layer to layer.
    starts: what `adapter.init` may be but default; None is every start.
    embeddings: whether it can adapt `embed_tokens`.
    identity_at_init: whether the model is the base before the first step.
    mergeable: whether `merge` does.
    zero_gradients: fields whose gradient is zero at the first step.
    carried: fields of which only later layers see anything: those of the last
      layer that is adapted have no gradient.
    share: `(key, Modules) -> Adapters.shared`.
    count_shared: trainable parameters of it, an expression of r, the options,
      the letters, and how many `modules` are adapted.
    samples: whether it is random in training, with or without dropout.
    mixes_tokens: whether what it makes of a token depends on the tokens that
      are computed beside it. It then adapts no head, and a step takes whole
      micro-batches; see `api.settings.memory`.
    rule: `(config, steps) -> Rule`, of methods with a say in training; None
      where the config's options have none.
    form: in PEFT's files; None where PEFT has no counterpart.
    vllm: whether vLLM serves it.
    build: for methods without adapters: `(base) -> (base, adapters)`.
    tiny: fields of `AdapterConfig` with which a model of width 32 tries it.
  """

  summary: str
  paper: str = ""
  adapter: type[base.Adapter] | None = None
  init: Callable[..., base.Adapter] | None = None
  kind: Callable[[base.Slot], type[base.Adapter]] | None = None
  count: str = ""
  options: type = NoOptions
  targets: str = "all-linear"
  sites: tuple[str, ...] = ()
  scale: Callable[[float, int, Any], float] = by_rank
  ranked: bool = True
  patterns: bool = False
  starts: tuple[str, ...] | None = ()
  embeddings: bool = False
  identity_at_init: bool = True
  mergeable: bool = True
  zero_gradients: tuple[str, ...] = ()
  carried: tuple[str, ...] = ()
  share: Callable[..., Any] | None = None
  count_shared: str = ""
  samples: bool = False
  mixes_tokens: bool = False
  rule: Callable[..., Rule | None] | None = None
  form: Form | None = None
  vllm: bool = False
  build: Callable | None = None
  tiny: Mapping[str, Any] = dataclasses.field(default_factory=dict)
