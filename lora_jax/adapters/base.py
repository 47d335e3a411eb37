"""The hooks of a PEFT method, and the tree they live in.

An `Adapter` is a `struct.dataclass` whose array fields belong to one place in
a model: a projection, a norm, an attention or MLP block, the input. Fields made
with `frozen()` are values the method needs but does not train (scales, rates,
ranks): they are traced, so a study varies them without compiling again, and
`partition.split` keeps them out of the optimiser.

Nothing is intercepted. Every place of a model asks the adapter that it is given
(`models.decoder`), and a method answers the questions that concern it:

  projections  apply, merge, shift      q_proj ... down_proj, lm_head
  tables       lookup, tied_logits      embed_tokens
  norms        merge                    input_layernorm, norm ...
  blocks       prefix, attended         self_attn
               residual                 self_attn, mlp
  input        virtual, labels          prompt
  layers       entered, left            layer
  two passes   guide                    what all layers share
  beside       begun                    what all layers share
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from lora_jax import keep as keep_lib
from lora_jax import mesh as mesh_lib
from lora_jax import struct
from lora_jax import trees
from lora_jax import types
from lora_jax.adapters import geometry as geometry_lib
from lora_jax.adapters import noise as noise_lib

Geometry = geometry_lib.Geometry


def trained(*axes: str | None, **options) -> Any:
  """A field that is trained, its last axes named as in `mesh.axes`."""
  return mesh_lib.axes(*axes, **options)


def frozen(*axes: str | None, **options) -> Any:
  """A field that is carried and traced, but not trained; see `trained`."""
  return mesh_lib.axes(*axes, metadata={"trainable": False}, **options)


def up(*axes: str | None, **options) -> Any:
  """A trained field that starts at zero and learns at LoRA+'s faster rate."""
  return mesh_lib.axes(*axes, metadata={"rate_group": "up"}, **options)


def static(**options) -> Any:
  """A field of the program, not of the data: compared and never traced."""
  return struct.field(pytree_node=False, **options)


# Groups of parameters whose learning rate LoRA+ (arXiv 2402.12354) changes:
# what starts at zero, and the adapters of embeddings.
RATE_GROUPS = ("up", "embedding")
# What `jax.checkpoint` policies know by name: products that a method has yet
# to finish, and norms of their columns.
PRODUCT, NORMS = "product", "norms"


@struct.dataclass
class Slot:
  """One place that is to be adapted: what a method's `init` is told of it.

  Attributes:
    rank: `[]` int32; 0: not adapted. Methods without ranks have 1.
    scale: `[]`, what the registry's row makes of alpha and r.
    rate: `[]`, dropout rate.
    given: (A, B) that were taken out of the weight, or None; see `starts`.
    stats: (A, B) that were made of rows, or None; see `starts`.
    number: `[]` int32, its own among all modules; see `method.Modules`.
    turn: `[]` int32, its own among those of its target.
    bias: `[o]`, the projection's, or None.
    target: its name; static, as all below.
    width: the largest rank of the stack.
    shape: `(i, o)` of a projection, `(v, d)` of the table, `(d,)` of a norm,
      `()` of a block or the input.
    options: the method's own dataclass.
    start: where A and B start, of methods that have a choice.
    geometry: the model's sizes, or None where only shapes are known.
  """

  rank: types.Array
  scale: types.Array
  rate: types.Array
  given: Any = None
  stats: Any = None
  number: types.Array | int = 0
  turn: types.Array | int = 0
  bias: Any = None
  target: str = static(default="")
  width: int = static(default=1)
  shape: tuple[int, ...] = static(default=())
  options: Any = static(default=None)
  start: Any = static(default=None)
  geometry: Geometry | None = static(default=None)

  @property
  def embedding(self) -> bool:
    return self.target == "embed_tokens"

  def values(self, *names: str) -> dict[str, types.Array]:
    """The fields of these names, for an adapter's of the same."""
    return {name: getattr(self, name) for name in names or (
        "scale", "rate", "rank")}


@struct.dataclass
class Adapter:
  """Base of all methods' parameters of one place; see `LoRA`.

  Its fields name their axes, by which they are cut over a mesh:
  `trained("in", None)` is `[i, r]`. A field without names is replicated.

  A field `rank` (0: this layer is not adapted) is what every method has. Where
  it is 0 an adapter must do nothing, and its values are only padding.
  """

  # Whether a head that is tied to an adapted embedding follows it.
  follows_tie: ClassVar[bool] = False
  # Frozen fields that the weight determines, and what all modules share: by
  # name, `(weight, shared) -> value`; see `partition.beside`.
  # `of_bias`: they are told of the whole projection, with its bias.
  constants: ClassVar[Mapping[str, Callable]] = {}
  of_bias: ClassVar[bool] = False
  # Whether it computes the same with zeros behind its ranks, which then have
  # no gradient; see `train.members`.
  pads: ClassVar[bool] = False
  # Whether `finish` does something, and its gradient reads the sum.
  finishes: ClassVar[bool] = False
  # Whether it is bound to what `Adapters.shared` makes of a first pass.
  guided: ClassVar[bool] = False
  # Whether it is a small decoder that reads the input first; see
  # `models.beside`, which says what it has.
  reads_first: ClassVar[bool] = False

  # --- projections

  def apply(
      self, x: types.Array, weight: types.Tree,
      noise: noise_lib.Noise | None = None,
  ) -> types.Array:
    """The adapted product `[..., o]` of x `[..., i]`, without the bias."""
    raise TypeError(f"{type(self).__name__} adapts no projection")

  def merge(self, weight: types.Tree) -> types.Array:
    """A plain float32 weight with the same effect, `[i, o]` or `[d]`."""
    raise TypeError(f"{type(self).__name__} cannot be merged")

  def shift(self, bias: types.Array | None) -> types.Array | None:
    """The adapted projection's bias `[o]`; None stays None unless trained."""
    return bias

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

  def prepared(
      self, weight: types.Tree, shared: types.Tree = None) -> Adapter:
    """With whatever stays the same from token to token computed once.

    Args:
      weight: `[i, o]`.
      shared: `Adapters.shared`; see `bound`.
    """
    del weight, shared
    return self

  def narrowed(self, dtype: Any) -> Adapter:
    """With what every product would round to `dtype` rounded once."""
    del dtype
    return self

  # --- tables

  def lookup(self, tokens: types.Array, table: types.Array) -> types.Array:
    """Adapted embedding rows, `[..., d]` for `tokens [...]`."""
    raise TypeError(f"{type(self).__name__} adapts no embedding")

  def tied_logits(self, x: types.Array, logits: types.Array) -> types.Array:
    """Logits `[..., v]` of a head tied to the embedding that this adapts.

    Args:
      x: `[..., d]`, what the head was applied to.
      logits: of the frozen table.
    """
    del x
    return logits

  # --- blocks

  def prefix(self) -> tuple[types.Array, types.Array, types.Array] | None:
    """Keys and values `[n, k, e]` before every segment's own, and whether
    they are seen in this layer, `[]` or `[n]` bool; or None."""
    return None

  def attended(
      self, q: types.Array, o: types.Array,
      project: Callable[[types.Array, str], types.Array], scale: float,
  ) -> types.Array:
    """What attention found, with what this adds to it.

    Args:
      q: `[b, t, h, e]`, rotated.
      o: `[b, t, h, e]`, before o_proj.
      project: `(x [..., i], target) -> [..., o]`, this layer's projections.
      scale: of attention's logits.

    Returns:
      `[b, t, h, e]`.
    """
    del q, project, scale
    return o

  def residual(
      self, x: types.Array, y: types.Array,
      noise: noise_lib.Noise | None = None,
  ) -> types.Array:
    """What a block adds to the hidden states, `[b, t, d]`.

    Args:
      x: `[b, t, d]`, the block's normed input.
      y: `[b, t, d]`, its output.
      noise: of a training step, or None.
    """
    del x, noise
    return y

  # --- layers

  def entered(
      self, hidden: types.Array, state: types.Array,
      noise: noise_lib.Noise | None = None,
  ) -> types.Array:
    """A layer's input `[b, t, d]`, with what this adds to it.

    Args:
      hidden: `[b, t, d]`.
      state: `[b, t, d]`, what goes from layer to layer beside it; see `begun`.
      noise: of a training step, or None.
    """
    del state, noise
    return hidden

  def left(self, hidden: types.Array, state: types.Array) -> types.Array:
    """The next layer's `state`; `hidden` is what this one has put out."""
    del hidden
    return state

  # --- input

  def virtual(self) -> types.Array:
    """Embeddings `[n, d]` of the virtual tokens before every segment; of
    several `tasks` one after the other, each as many."""
    raise TypeError(f"{type(self).__name__} has no virtual tokens")

  @property
  def tasks(self) -> int:
    """Tasks whose virtual tokens differ."""
    return 1

  def labels(self) -> tuple[types.Array, types.Array] | None:
    """Tokens `[n]` that virtual ones stand for, and the weights `[n]` of
    predicting each in training; None if there is nothing to predict."""
    return None

  # --- what all layers share

  def bound(self, shared: types.Tree) -> Adapter:
    """With its part of `Adapters.shared`, of one layer."""
    del shared
    return self

  def guide(
      self, hidden: types.Array, noise: noise_lib.Noise | None = None
  ) -> types.Tree:
    """What adapters that are `guided` are bound to, of one that is shared.

    Args:
      hidden: `[b, t, d]`, the model's without its layers' adapters, after the
        final norm.
      noise: of a training step, or None.
    """
    raise TypeError(f"{type(self).__name__} makes nothing of a first pass")

  def begun(self, hidden: types.Array) -> types.Array:
    """The first layer's `state` `[b, t, d]`, of one that `reads_first`.

    Args:
      hidden: `[b, t, d']`, its own last hidden states.
    """
    raise TypeError(f"{type(self).__name__} reads nothing first")

  def by_token(self) -> types.Tree:
    """What it knows of each token, `[b, t, ...]`; None if nothing."""
    return None

  def of_tokens(self, known: types.Tree) -> Adapter:
    """With another such value: of some tokens of every row."""
    del known
    return self

  def folded(self, shared: types.Tree) -> Adapter:
    """One that needs no part of `Adapters.shared`, if that is no larger."""
    del shared
    return self

  # --- other adapters, other files

  def difference(self) -> Adapter:
    """This adapter on the base before `starts` changed it; see `LoRA`."""
    return self

  def part(self, shared: types.Tree) -> types.Tree:
    """What its `constants` are told of `Adapters.shared`."""
    return shared

  def with_constants(self, values: Mapping[str, Any]) -> Self:
    """With values in place of its `constants`; None has it ask the weight."""
    return dataclasses.replace(self, **values)

  def resized(self, kept: Sequence[int], width: int) -> Self:
    """One unstacked module with these of its ranks, in this order, padded to
    `width`; see `resize`."""
    raise TypeError(f"{type(self).__name__} has no ranks to choose from")

  def inert(self) -> Self:
    """One of the same shapes that does nothing."""
    return dataclasses.replace(self, rank=0 * self.rank)  # type: ignore

  def to_peft(self, embedding: bool = False) -> dict[str, types.Array]:
    """Tensors of one unstacked module by name suffix: PEFT's where it has the
    method, by default the trained fields under their own names."""
    del embedding
    return {name: getattr(self, name) for name in self._saved()}

  @classmethod
  def from_peft(cls, tensors: Mapping[str, types.Array], slot: Slot) -> Self:
    """Inverse of `to_peft`.

    Args:
      tensors: of one module, by suffix.
      slot: its rank, scale, rate; width of the stack; static values.

    Raises:
      KeyError: if a tensor is missing.
    """
    own = {f.name for f in dataclasses.fields(cls)}
    values = {k: v for k, v in slot.values().items() if k in own}
    return cls(**values, **{
        name: jnp.asarray(tensors[name], jnp.float32)
        for name in cls._saved()})

  @classmethod
  def peft_rank(cls, tensors: Mapping[str, types.Array]) -> int | None:
    """The rank of a module's tensors; None if the config alone tells.

    Raises:
      KeyError: if the tensor that tells is missing.
    """
    del tensors
    return None

  @classmethod
  def expected(
      cls, tensors: Mapping[str, types.Array], slot: Slot
  ) -> dict[str, tuple[int, ...]] | None:
    """Shapes that a module's tensors must have by suffix, where a file may say
    more of them than `slot`; None: those of a new adapter."""
    del tensors, slot
    return None

  @classmethod
  def _saved(cls) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)
            if f.metadata.get("pytree_node", True)
            and f.metadata.get("trainable", True)]

  # --- trees

  def active(self, value: types.Array, neutral: Any) -> jax.Array:
    """`value` where this layer is adapted, else `neutral`."""
    return jnp.where(self.rank > 0, value, neutral)  # type: ignore

  def selected(self, trainable: bool) -> Self:
    """Only the trained fields, or only the others; None elsewhere."""
    return dataclasses.replace(self, **{
        field.name: None for field in dataclasses.fields(self)
        if field.metadata.get("pytree_node", True)
        and field.metadata.get("trainable", True) != trainable})

  def with_rate(self, rate: float) -> Self:
    """With another rate of dropout, if it has one."""
    if not hasattr(self, "rate"):
      return self
    return self.replace(  # type: ignore[attr-defined]
        rate=jnp.full_like(self.rate, rate))

  def rate_groups(self, embedding: bool = False) -> Adapter:
    """A key of `RATE_GROUPS` or None in place of every leaf.

    Args:
      embedding: whether this adapts `embed_tokens`.
    """

    def group(field):
      name = "embedding" if embedding else field.metadata.get("rate_group")
      return jax.tree.map(lambda _: name, getattr(self, field.name))

    return dataclasses.replace(self, **{
        field.name: group(field) for field in dataclasses.fields(self)
        if field.metadata.get("pytree_node", True)})

  def size(self) -> int:
    """Trainable parameters; padding and layers not adapted do not count."""
    total = trees.size(self.selected(True))
    rank: Any = getattr(self, "rank", None)
    if rank is None:
      return total
    return total * int((rank > 0).sum()) // max(1, rank.size)


@struct.dataclass
class Adapters:
  """Everything a run trains, beside the frozen base.

  Attributes:
    layers: adapters of the scanned layers by target name, leaves `[l, ...]`,
      or `runs.Runs` of several such stacks; `partition.module` takes one out.
    outer: adapters of `embed_tokens`, `norm` and `lm_head`, and `prompt`.
    overrides: a partial base tree; its leaves are trained in place of the
      base's (full fine-tuning; `None` for methods that override nothing).
    shared: an adapter (or several by name) whose values all layers see.
  """

  layers: dict[str, Any] = struct.field(default_factory=dict)
  outer: dict[str, Any] = struct.field(default_factory=dict)
  overrides: Any = None
  shared: Any = None
