"""The hooks of a PEFT method, and the tree they live in.

An `Adapter` is a `struct.dataclass` whose array fields belong to one
projection. Fields made with `frozen()` are values the method needs but does
not train (scales, rates, ranks): they are traced, so a study varies them
without compiling again, and `split` keeps them out of the optimiser:

  Adapters({"q_proj": LoRA(a, b, scale, rate)})
  -> trainable Adapters({"q_proj": LoRA(a, b, None, None)})
  -> frozen    Adapters({"q_proj": LoRA(None, None, scale, rate)})

Nothing is intercepted: every projection of a model is one call
`project(x, weight, adapter)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
from typing import Any, ClassVar
import zlib

import jax
import jax.numpy as jnp

from lora_jax import host as host_lib
from lora_jax import keep as keep_lib
from lora_jax import mesh as mesh_lib
from lora_jax import quant
from lora_jax import struct
from lora_jax import trees
from lora_jax import types
from lora_jax.quant import fp8
from lora_jax.quant import fp8_joint


def trained(*axes: str | None, **options) -> Any:
  """A field that is trained, its last axes named as in `mesh.axes`."""
  return mesh_lib.axes(*axes, **options)


def frozen(*axes: str | None, **options) -> Any:
  """A field that is carried and traced, but not trained; see `trained`."""
  return mesh_lib.axes(*axes, metadata={"trainable": False}, **options)


def up(*axes: str | None, **options) -> Any:
  """A trained field that starts at zero and learns at LoRA+'s faster rate."""
  return mesh_lib.axes(*axes, metadata={"rate_group": "up"}, **options)


# Groups of parameters whose learning rate LoRA+ (arXiv 2402.12354) changes:
# what starts at zero, and the adapters of embeddings.
RATE_GROUPS = ("up", "embedding")
# What `jax.checkpoint` policies know by name: products that a method has yet
# to finish, and norms of their columns.
PRODUCT, NORMS = "product", "norms"


@struct.dataclass
class Noise:
  """Counter-based randomness that packing and sharding cannot move.

  Every token's mask depends on (seed, step, layer, target, global example
  id, position in the example) and on nothing else: not on the row a token
  was packed into, nor on the micro-batch or device it landed on.

  Attributes:
    key: PRNG key, already folded with the step.
    example_ids: `[b, t]` int32.
    positions: `[b, t]` int32.
  """

  key: jax.Array
  example_ids: types.Array
  positions: types.Array

  def at_layer(self, layer: types.Array) -> Noise:
    return dataclasses.replace(
        self, key=jax.random.fold_in(self.key, layer))

  def for_target(self, target: str) -> Noise:
    # A digest of the name, so that adding a target moves no other's mask.
    index = zlib.crc32(target.encode()) & 0x7FFFFFFF
    return dataclasses.replace(
        self, key=jax.random.fold_in(self.key, index))

  def dropout(self, x: types.Array, rate: types.Array) -> types.Array:
    """Inverted dropout of `x [b, t, i]` at a traced `rate []`."""

    def bits(example, position):
      key = jax.random.fold_in(self.key, example)
      key = jax.random.fold_in(key, position)
      return jax.random.uniform(key, x.shape[-1:])

    draw = jax.vmap(jax.vmap(bits))(self.example_ids, self.positions)
    keep = draw >= rate
    return jnp.where(keep, x / (1.0 - rate).astype(x.dtype), 0)


@struct.dataclass
class Adapter:
  """Base of all methods' per-projection parameters; see `LoRA`.

  A *projection* method implements:
    apply(x [..., i], weight, noise) -> [..., o]: the adapted product.
    merge(weight) -> [i, o]: a plain weight with the same effect.

  Its fields name their axes, by which they are cut over a mesh:
  `trained("in", None)` is `[i, r]`. A field without names is replicated.
  """

  # PEFT's `peft_type`; None where Hugging Face PEFT has no counterpart.
  peft_type: ClassVar[str | None] = None
  # Whether a head that is tied to an adapted embedding follows it.
  follows_tie: ClassVar[bool] = False
  # Frozen fields that the weight alone determines; see `beside`.
  constants: ClassVar[Mapping[str, Callable]] = {}
  # Whether `finish` does something, and its gradient reads the sum.
  finishes: ClassVar[bool] = False

  def apply(
      self, x: types.Array, weight: types.Tree, noise: Noise | None = None
  ) -> types.Array:
    raise TypeError(f"{type(self).__name__} adapts no projection")

  def merge(self, weight: types.Tree) -> types.Array:
    raise TypeError(f"{type(self).__name__} cannot be merged")

  def down_up(self, x: types.Array) -> types.Array:
    """x A B `[..., o]` in x's dtype, of one that has `factors`."""
    raise TypeError(f"{type(self).__name__} adds no product")

  def factors(self) -> tuple[types.Array, types.Array] | None:
    """(A `[i, r]`, B `[r, o]`) float32 of a method that adds x A B to x W, so
    that the sum can be one product; None for others."""
    return None

  @property
  def reads_cross(self) -> bool:
    """Whether `finish` has a use for A^T W."""
    return False

  def finish(
      self, y: types.Array, weight: types.Tree,
      cross: types.Array | None = None, keep: keep_lib.Keep = keep_lib.named,
  ) -> types.Array:
    """What such a method makes of the sum, `[..., o]`.

    Args:
      y: `[..., o]`.
      weight: `[i, o]`.
      cross: A^T W `[r, o]` float32, if it `reads_cross`.
      keep: is given what else than y the gradient reads.
    """
    del weight, cross, keep
    return y

  def prepared(self, weight: types.Tree) -> Adapter:
    """With whatever stays the same from token to token computed once."""
    del weight
    return self

  def narrowed(self, dtype: Any) -> Adapter:
    """With what every product would round to `dtype` rounded once."""
    del dtype
    return self

  def tied_logits(self, x: types.Array, logits: types.Array) -> types.Array:
    """Logits `[..., v]` of a head tied to the embedding that this adapts.

    Args:
      x: `[..., d]`, what the head was applied to.
      logits: of the frozen table.
    """
    del x
    return logits

  def difference(self) -> Adapter:
    """This adapter on the base before `starts` changed it; see `LoRA`."""
    return self

  def to_peft(self, embedding: bool = False) -> dict[str, types.Array]:
    """PEFT's tensors of one unstacked module, by name suffix."""
    raise TypeError(f"{type(self).__name__} has no counterpart in PEFT")

  @classmethod
  def from_peft(cls, tensors, width: int, frozen) -> Adapter:
    """Inverse of `to_peft`; see `LoRA.from_peft`."""
    raise TypeError(f"{cls.__name__} has no counterpart in PEFT")

  def rate_groups(self, embedding: bool = False) -> Adapter:
    """A key of `RATE_GROUPS` or None in place of every leaf.

    Args:
      embedding: whether this adapts `embed_tokens`.
    """

    def group(field):
      if getattr(self, field.name) is None:
        return None
      if embedding:
        return "embedding"
      return field.metadata.get("rate_group")

    return dataclasses.replace(self, **{
        field.name: group(field) for field in dataclasses.fields(self)
        if field.metadata.get("pytree_node", True)})

  def size(self) -> int:
    """Trainable parameters; padding does not count."""
    return trees.size(_select(self, True))


@struct.dataclass
class Adapters:
  """Everything a run trains, beside the frozen base.

  Attributes:
    layers: adapters of the scanned layers by target name, leaves `[l, ...]`.
    outer: adapters of `embed_tokens` and `lm_head`.
    overrides: a partial base tree; its leaves are trained in place of the
      base's (full fine-tuning; `None` for methods that override nothing).
  """

  layers: dict[str, Any] = struct.field(default_factory=dict)
  outer: dict[str, Any] = struct.field(default_factory=dict)
  overrides: Any = None


def project(
    x: types.Array,
    weight: types.Tree,
    adapter: Adapter | None = None,
    noise: Noise | None = None,
) -> types.Array:
  """`x [..., i]` through a frozen, perhaps quantised, adapted weight.

  Args:
    x: `[..., i]`.
    weight: `[i, o]`, an array or a `quant.QuantizedArray`.
    adapter: this projection's adapter, or None.
    noise: randomness of a training step; None is deterministic.

  Returns:
    `[..., o]` in `x.dtype`, without the bias.
  """
  if adapter is None:
    return quant.matmul(x, weight)
  return adapter.apply(x, weight, noise)


def project_all(
    x: types.Array,
    weights: Sequence[types.Tree],
    adapters: Sequence[Adapter | None],
    noise: Sequence[Noise | None],
    join: bool = False,
    keep: keep_lib.Keep = keep_lib.named,
) -> list[types.Array]:
  """`project` for projections that read the same x.

  Args:
    x: `[..., i]`.
    weights, adapters, noise: of each projection.
    join: whether low-rank products may be part of the frozen ones, where a
      method has `factors`: they then cost next to nothing. Those in 8 bits
      share x's rounding, adapted or not.
    keep: is given x A, "low", where they are, and what a method's gradient
      reads.

  Returns:
    A `[..., o]` for each.
  """
  def finished(k, y, cross=None):
    adapter = adapters[k]
    if adapter is None:
      return y
    if adapter.finishes:
      y = keep(PRODUCT, y)
    return adapter.finish(y, weights[k], cross, keep)

  found: dict[int, types.Array] = {}
  if join:
    found |= {k: finished(k, y) for k, y in _in_float8(
        x, weights, adapters, noise, keep).items()}
  joined = []

  for k, (adapter, draw) in enumerate(zip(adapters, noise, strict=True)):
    if (join and k not in found and adapter is not None and draw is None
        and not isinstance(weights[k], fp8.InFloat8)):
      factors = adapter.factors()
      if factors is not None:
        joined.append((k, adapter, factors))
  if joined:
    pairs = quant.joint_matmul(
        x, [weights[k] for k, *_ in joined], [pair for *_, pair in joined],
        keep, any(adapter.reads_cross for _, adapter, _ in joined))
    for (k, *_), (y, cross) in zip(joined, pairs, strict=True):
      found[k] = finished(k, y, cross)
  for k, one in enumerate(zip(weights, adapters, noise, strict=True)):
    weight, adapter, draw = one
    if k in found:
      continue
    if adapter is not None and keeps_sum(adapter, draw):
      found[k] = finished(k, quant.matmul(x, weight) + adapter.down_up(x))
    else:
      found[k] = project(x, *one)
  return [found[k] for k in range(len(weights))]


def keeps_sum(adapter: Adapter | None, noise: Noise | None) -> bool:
  """Whether the backward pass keeps a sum that the adapted product is made of
  element by element, so that it need not keep the product, too."""
  return adapter is not None and adapter.finishes and noise is None


def with_rate(adapters: types.Tree, rate: float) -> types.Tree:
  """Adapters with another rate of dropout."""
  return jax.tree.map(
      lambda a: a.replace(rate=jnp.full_like(a.rate, rate))
      if hasattr(a, "rate") else a, adapters,
      is_leaf=lambda x: isinstance(x, Adapter))


def _in_float8(x, weights, adapters, noise, keep):
  """By index, those of `project_all` that are products in 8 bits together."""
  factors = {}
  for k, (adapter, draw) in enumerate(zip(adapters, noise, strict=True)):
    added = None if adapter is None else adapter.factors()
    if adapter is None or (added is not None and draw is None):
      factors[k] = added
  found: dict[int, types.Array] = {}
  known = list(factors)
  for group in fp8_joint.together(
      x, [weights[k] for k in known], list(factors.values())):
    group = [known[n] for n in group]
    found |= zip(group, fp8_joint.matmul(
        x, [weights[k] for k in group], [factors[k] for k in group], keep),
                 strict=True)
  return found


def split(adapters: types.Tree) -> tuple[types.Tree, types.Tree]:
  """(trainable, frozen): partial trees that `trees.combine` joins again."""
  return _select(adapters, True), _select(adapters, False)


def _select(tree: types.Tree, trainable: bool) -> types.Tree:
  def pick(node):
    if not isinstance(node, Adapter):
      return node if trainable else None
    return dataclasses.replace(node, **{
        field.name: None
        for field in dataclasses.fields(node)
        if field.metadata.get("pytree_node", True)
        and field.metadata.get("trainable", True) != trainable})

  return jax.tree.map(pick, tree, is_leaf=lambda x: isinstance(x, Adapter))


def rate_groups(params: types.Tree) -> types.Tree:
  """LoRA+'s group of every leaf of `params`, or None where it says nothing.

  {"outer": {"embed_tokens": LoRA(a, b)}} -> LoRA("embedding", "embedding")
  {"layers": {"q_proj": LoRA(a, b)}}      -> LoRA(None, "up")

  Args:
    params: the trainable part of an `Adapters`, or any tree.

  Returns:
    A partial tree with names of `RATE_GROUPS` for leaves.
  """

  def groups(path, node):
    if not isinstance(node, Adapter):
      return None
    return node.rate_groups(embedding=trees.path_str(path).endswith(
        "embed_tokens"))

  return jax.tree_util.tree_map_with_path(
      groups, params, is_leaf=lambda x: isinstance(x, Adapter))


def join(trainable: types.Tree, frozen_part: types.Tree) -> types.Tree:
  """Inverse of `split`."""
  return trees.combine(trainable, frozen_part)


def beside(adapters: Adapters, tree: types.Tree) -> Adapters:
  """Adapters that know the constants of the weights which they stand beside.

  Whoever makes adapters for a base, or changes the base below them, ends with
  this.

  Args:
    adapters: whole tree.
    tree: the base; see `prepared`.
  """

  def known(adapter, weight, stacked):
    if not adapter.constants:
      return adapter
    return dataclasses.replace(adapter, **_constants(
        weight, functions=tuple(adapter.constants.items()), stacked=stacked))

  weights = _outer_weights(tree)
  return dataclasses.replace(
      adapters,
      layers={name: known(adapter, tree.layers[name].weight, True)
              for name, adapter in adapters.layers.items()},
      outer={name: known(adapter, weights[name], False)
             for name, adapter in adapters.outer.items()})


def without_constants(adapter: Adapter) -> Adapter:
  """An adapter that asks its weight instead; see `beside`."""
  return dataclasses.replace(adapter, **dict.fromkeys(adapter.constants))


@functools.partial(jax.jit, static_argnames=("functions", "stacked"))
def _constants(weight, *, functions, stacked):
  def one(w):
    w = host_lib.on_device(w)
    return {name: function(w) for name, function in functions}

  # One layer at a time: a dequantised stack would not fit beside the base.
  return jax.lax.map(one, weight) if stacked else one(weight)


def _outer_weights(tree):
  return {"embed_tokens": tree.embed_tokens,
          "lm_head": tree.lm_head and tree.lm_head.weight}


@functools.partial(jax.jit, static_argnames="dtype")
def prepared(
    adapters: Adapters, tree: types.Tree, dtype: Any = jnp.float32
) -> Adapters:
  """Adapters for decoding with frozen weights: see `Adapter.prepared`.

  Args:
    adapters: whole tree.
    tree: the base, whose `layers[target].weight` is stacked.
    dtype: of the activations that they will be applied to.

  Returns:
    A tree that computes the same.
  """
  layers = {
      name: jax.lax.map(
          lambda pair: pair[0].prepared(
              host_lib.on_device(pair[1])).narrowed(dtype),
          (adapter, tree.layers[name].weight))
      for name, adapter in adapters.layers.items()}
  weights = _outer_weights(tree)
  outer = {name: adapter.prepared(weights[name])
           for name, adapter in adapters.outer.items()}
  return dataclasses.replace(adapters, layers=layers, outer=outer)


def trainable_size(adapters: types.Tree) -> int:
  """Trainable parameters of a whole tree; padding does not count."""
  is_adapter = lambda x: isinstance(x, Adapter)
  return sum(
      node.size() if is_adapter(node) else trees.size(node)
      for node in jax.tree.leaves(adapters, is_leaf=is_adapter))
