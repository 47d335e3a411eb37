"""Several methods in one model.

  h = x p_n(... p_2(p_1(W0)))

Parts p_1 ... p_n stand in the order of the config. On a projection they are
nested, as in Hugging Face PEFT's `PeftMixedModel`: the second adapts the
projection as the first left it, bias included. What only adds (LoRA and its
kin) therefore sums up. Blocks are gone through in the same order; keys and
values of prefixes, and virtual tokens, stand one part's after the other's.

Every place of such a model has a `Several`, even where one part adapts it, so
that a path in the tree says whose a value is:

  {"lora": Adapters({"q_proj": LoRA}), "houlsby": Adapters({"mlp": Bottleneck})}
  -> Adapters({"q_proj": Several({"lora": LoRA}),
               "mlp": Several({"houlsby": Bottleneck})})

Trainable parameters: the sum of the parts'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import errors
from lora_jax import keep as keep_lib
from lora_jax import quant
from lora_jax import struct
from lora_jax.adapters import base
from lora_jax.adapters import noise as noise_lib
from lora_jax.adapters import partition


@struct.dataclass
class Adapted(quant.Computed):
  """A weight as an adapter leaves it; no matrix until one is asked for.

  Attributes:
    weight: `[i, o]`, which may be one of these, too.
    adapter: what adapts it, with what it shares.
    noise: of a training step, or None.
  """

  weight: Any
  adapter: base.Adapter
  noise: noise_lib.Noise | None = None

  @property
  def shape(self):
    return self.weight.shape

  @property
  def dtype(self):
    return self.weight.dtype

  def matmul(self, x):
    return self.adapter.apply(x, self.weight, self.noise)

  def dequantize(self, dtype=jnp.float32):
    return self.adapter.merge(self.weight).astype(dtype)

  def take(self, rows):
    return self.adapter.lookup(rows, self.weight)


@struct.dataclass
class Several(base.Adapter):
  """Attributes:

    parts: adapters of one place by the name of the part.
    order: names of the parts, the innermost first; static.
  """

  parts: dict[str, base.Adapter]
  order: tuple[str, ...] = base.static(default=())

  def __iter__(self) -> Iterator[base.Adapter]:
    return (self.parts[name] for name in self.order)

  @property
  def only(self) -> base.Adapter | None:
    """The one part, where there is one."""
    return self.parts[self.order[0]] if len(self.order) == 1 else None

  def each(self, change: Callable[[base.Adapter], Any]) -> Several:
    """With `change` of every part in its place."""
    return dataclasses.replace(self, parts={
        name: change(part) for name, part in self.parts.items()})

  def _drawn(self, noise) -> Iterator[tuple[base.Adapter, Any]]:
    """Every part, and its own noise."""
    for name in self.order:
      yield self.parts[name], noise and noise.for_target(name)

  # --- projections

  def apply(self, x, weight, noise=None):
    for part, draw in self._drawn(noise):
      weight = Adapted(weight, part, draw)
    return weight.matmul(x)

  def merge(self, weight):
    for part in self:
      weight = part.merge(weight)
    return weight

  def shift(self, bias):
    for part in self:
      bias = part.shift(bias)
    return bias

  def factors(self):
    """Of parts that all add: side by side, their A; one below another, B."""
    if self.only is not None:
      return self.only.factors()
    found = [None if part.finishes else part.factors() for part in self]
    if any(pair is None for pair in found):
      return None
    return tuple(jnp.concatenate(x, axis) for x, axis in zip(
        zip(*found), (1, 0)))  # type: ignore[misc]

  def down_up(self, x):
    return sum(part.down_up(x) for part in self)

  # What finishes a sum must be the last to do so: it has to be alone.

  @property
  def finishes(self) -> bool:  # type: ignore[override]
    return self.only is not None and self.only.finishes

  @property
  def reads_cross(self) -> bool:
    return self.only is not None and self.only.reads_cross

  def finish(self, y, weight, cross=None, keep=keep_lib.named):
    if self.only is None:
      return y
    return self.only.finish(y, weight, cross, keep)

  # The weight that a constant is of is the first part's.

  @property
  def constants(self):  # type: ignore[override]
    return self.parts[self.order[0]].constants

  @property
  def pads(self) -> bool:  # type: ignore[override]
    return all(part.pads for part in self)

  @property
  def of_bias(self) -> bool:  # type: ignore[override]
    return self.parts[self.order[0]].of_bias

  def part(self, shared):
    return (shared or {}).get(self.order[0])

  def with_constants(self, values):
    first = self.order[0]
    return dataclasses.replace(self, parts=self.parts | {
        first: self.parts[first].with_constants(values)})

  def folded(self, shared):
    return dataclasses.replace(self, parts={
        name: part.folded((shared or {}).get(name))
        for name, part in self.parts.items()})

  def prepared(self, weight, shared=None):
    found = {}
    for name, part in zip(self.order, self, strict=True):
      own = (shared or {}).get(name)
      found[name] = part.prepared(weight, own)
      weight = Adapted(weight, part.bound(own))
    return dataclasses.replace(self, parts=found)

  def narrowed(self, dtype):
    return self.each(lambda part: part.narrowed(dtype))

  # --- tables

  @property
  def follows_tie(self) -> bool:  # type: ignore[override]
    return all(part.follows_tie for part in self)

  def lookup(self, tokens, table):
    for part in self:
      table = Adapted(table, part)
    return table.take(tokens)

  def tied_logits(self, x, logits):
    for part in self:
      logits = part.tied_logits(x, logits)
    return logits

  # --- blocks

  def prefix(self):
    found = [pair for pair in (part.prefix() for part in self) if pair]
    if not found:
      return None
    keys, values, _ = (jnp.concatenate(x) for x in zip(*(
        (k, v, jnp.zeros(len(k))) for k, v, _ in found)))
    seen = jnp.concatenate([
        jnp.broadcast_to(flag, len(k)) for k, _, flag in found])
    return keys, values, seen

  def attended(self, q, o, project, scale):
    for part in self:
      o = part.attended(q, o, project, scale)
    return o

  def residual(self, x, y, noise=None):
    for part, draw in self._drawn(noise):
      y = part.residual(x, y, draw)
    return y

  # --- input

  @property
  def tasks(self) -> int:  # type: ignore[override]
    return max(part.tasks for part in self)

  def virtual(self):
    rows = [part.virtual() for part in self]
    d = rows[0].shape[-1]
    by_task = [jnp.broadcast_to(
        x.reshape(part.tasks, -1, d),
        (self.tasks, x.shape[0] // part.tasks, d))
               for x, part in zip(rows, self, strict=True)]
    return jnp.concatenate(by_task, 1).reshape(-1, d)

  def labels(self):
    found = [part.labels() for part in self]
    if all(pair is None for pair in found):
      return None
    sizes = [part.virtual().shape[0] // part.tasks for part in self]
    pairs = [(jnp.zeros(n, jnp.int32), jnp.zeros(n)) if pair is None else pair
             for n, pair in zip(sizes, found, strict=True)]
    ids, weights = (jnp.concatenate(x) for x in zip(*pairs, strict=True))
    return ids, weights

  # --- trees

  def bound(self, shared):
    return dataclasses.replace(self, parts={
        name: part.bound((shared or {}).get(name))
        for name, part in self.parts.items()})

  def difference(self):
    return self.each(lambda part: part.difference())

  def inert(self):
    return self.each(lambda part: part.inert())

  def selected(self, trainable):
    return self.each(lambda part: part.selected(trainable))

  def with_rate(self, rate):
    return self.each(lambda part: part.with_rate(rate))

  def rate_groups(self, embedding=False):
    return self.each(lambda part: part.rate_groups(embedding))

  def size(self) -> int:
    return sum(part.size() for part in self)


def joined(trees: Mapping[str, base.Adapters]) -> base.Adapters:
  """Trees of parts as one; see the module's text.

  Args:
    trees: by name, in their order. What is trained whole beside adapters
      (`overrides`) belongs to the first.

  Raises:
    errors.UserError: if one of them has a pass of its own.
  """
  for name, tree in trees.items():
    if partition.is_guided(tree):
      raise errors.UserError(
          f"{name} looks at the model without adapters first, and cannot be "
          "one of several methods; use it alone")
    if partition.reader(tree) is not None:
      raise errors.UserError(
          f"{name} has a decoder of its own beside the model, and cannot be "
          "one of several methods; use it alone")

  def at(field):
    places: dict[str, dict[str, base.Adapter]] = {}
    for name, tree in trees.items():
      for target, adapter in getattr(tree, field).items():
        own = places.setdefault(target, {})
        if own:  # The weight it knows constants of is not the base's.
          adapter = adapter.with_constants(dict.fromkeys(adapter.constants))
        own[name] = adapter
    return {target: Several(parts=own, order=tuple(own))
            for target, own in places.items()}

  shared = {name: tree.shared for name, tree in trees.items()
            if tree.shared is not None}
  return base.Adapters(
      layers=at("layers"), outer=at("outer"), shared=shared or None,
      overrides=next(iter(trees.values())).overrides)


def apart(
    adapters: base.Adapters, names: Sequence[str]
) -> dict[str, base.Adapters]:
  """Inverse of `joined`, for parts of these names."""

  def at(places, name):
    return {target: one.parts[name] for target, one in places.items()
            if name in one.parts}

  return {name: base.Adapters(
      layers=at(adapters.layers, name), outer=at(adapters.outer, name),
      shared=(adapters.shared or {}).get(name),
      overrides=adapters.overrides if name == names[0] else None)
          for name in names}


def before(
    adapters: base.Adapters, name: str, kept: Sequence[str]
) -> tuple[str, str] | None:
  """Why a part cannot be merged while others are kept: (place, other part).

  It acts there on what the other has made of the weight. Where both only add,
  their order is nothing.

  Args:
    adapters: of several parts.
    name: the part.
    kept: names of others, which may come before it or after.

  Returns:
    The first such place, or None.
  """
  for field in ("layers", "outer"):
    for target, one in getattr(adapters, field).items():
      if name not in one.order:
        continue
      inner = one.order[:one.order.index(name)]
      for other in kept:
        if other in inner and not all(
            _adds(one.parts[n], (adapters.shared or {}).get(n),
                  field == "layers") for n in (name, other)):
          return target, other
  return None


def _adds(adapter, shared, stacked) -> bool:
  """Whether an adapter only adds a product."""

  def factors(one):
    return one.bound(shared).factors()

  found = jax.eval_shape(jax.vmap(factors) if stacked else factors, adapter)
  return found is not None and not adapter.finishes


def sizes(
    adapters: base.Adapters, names: Sequence[str]) -> dict[str, int]:
  """Trainable parameters of each part."""
  return {name: partition.trainable_size(tree)
          for name, tree in apart(adapters, names).items()}
