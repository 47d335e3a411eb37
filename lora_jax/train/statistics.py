"""What starts that look at rows are told of each projection y = x W.

Sums over the tokens of some batches: of x'x, of x and of 1, or of the gradient
of W. A *probe* stands where an adapter would, computes the frozen product, and
has a field of the shape of each sum whose gradient, it says, is that sum. So
one `jax.grad` of a step's loss gathers them for all layers, stacked, whatever
the model, its base (4-bit weights, in host memory or not) and its mesh.

The sums of a target take l i^2 (or l i o) floats; a few targets at a time, as
`LIMIT` allows, have them on the device, until A and B were made of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import adapters as adapters_lib
from lora_jax import mesh as mesh_lib
from lora_jax import quant
from lora_jax import struct
from lora_jax import types
from lora_jax.adapters import assemble
from lora_jax.adapters import base as base_lib
from lora_jax.adapters import config as config_lib
from lora_jax.adapters import starts
from lora_jax.adapters.starts import informed as informed_lib
from lora_jax.models import config as model_lib
from lora_jax.models import decoder
from lora_jax.train import step

# Bytes of sums that are gathered at once, unless one target has more.
LIMIT = 2**31


@struct.dataclass
class Inputs(base_lib.Adapter):
  """A probe of x, of the tokens that count.

  Attributes:
    gram: `[i, i]`, its gradient the sum of x'x.
    total: `[i]`, likewise of x.
    count: `[]`, of 1.
    mask: `[b, t]` float32, 1 where a token counts.
    by_row: divide each row by its maximum, and count rows.
  """

  gram: types.Array = base_lib.trained("in", None)
  total: types.Array = base_lib.trained("in")
  count: types.Array = base_lib.trained()
  mask: types.Array = base_lib.frozen()
  by_row: bool = base_lib.static(default=False)

  def apply(self, x, weight, noise=None):
    del noise
    return _seen(self.by_row, quant.matmul(x, weight), x, self.mask, {
        "gram": self.gram, "total": self.total, "count": self.count})


@struct.dataclass
class Gradient(base_lib.Adapter):
  """A probe of W: `delta` `[i, o]` has its gradient, x'g in float32."""

  delta: types.Array = base_lib.trained("in", "out")

  def apply(self, x, weight, noise=None):
    del noise
    return _beside(quant.matmul(x, weight), x, self.delta)


def moments(x: jax.Array, mask: jax.Array, by_row: bool) -> dict[str, Any]:
  """Sums of x'x `[i, i]`, x `[i]` and 1 `[]`, float32, of x `[b, t, i]`.

  Args:
    x: inputs.
    mask: `[b, t]`, 1 where a token counts.
    by_row: divide each row by (the size of) its maximum, and count rows.
  """
  x = x.astype(jnp.float32)
  counted = mask
  if by_row:
    largest = jnp.max(jnp.where(mask[..., None] > 0, x, -jnp.inf), (1, 2))
    there = jnp.any(mask > 0, 1)
    x = x / jnp.where(there, jnp.abs(largest), 1.0)[:, None, None]
    counted = there.astype(jnp.float32)
  x = x * mask[..., None]
  return {"gram": jnp.einsum("bti,btj->ij", x, x, precision="highest"),
          "total": jnp.sum(x, (0, 1)), "count": jnp.sum(counted)}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _seen(by_row, y, x, mask, sums):
  """y; the gradient of `sums` is `moments`."""
  del by_row, x, mask, sums
  return y


def _seen_forward(by_row, y, x, mask, sums):
  del by_row, sums
  return y, (x, mask)


def _seen_backward(by_row, residuals, g):
  x, mask = residuals
  return g, jnp.zeros_like(x), jnp.zeros_like(mask), moments(x, mask, by_row)


_seen.defvjp(_seen_forward, _seen_backward)


@jax.custom_vjp
def _beside(y, x, delta):
  """y, as if x delta had been added."""
  del x, delta
  return y


def _beside_forward(y, x, delta):
  del delta
  return y, x


def _beside_backward(x, g):
  return g, jnp.zeros_like(x), jnp.einsum(
      "...i,...o->io", x, g, precision="highest",
      preferred_element_type=jnp.float32)


_beside.defvjp(_beside_forward, _beside_backward)


def labelled(batch: types.Batch) -> jax.Array:
  """1 for tokens that carry a loss themselves, `[b, t]` float32.

  A batch has a token's weight where it is predicted from: one before.
  """
  before = jnp.pad(batch.loss_weights[:, :-1], ((0, 0), (1, 0)))
  return ((before > 0) & (batch.positions > 0) & (batch.segment_ids > 0)
          ).astype(jnp.float32)


@functools.partial(
    jax.jit, static_argnames=("names", "informed", "model", "settings"))
def inputs(
    base: types.Tree, batch: types.Batch, *, names: tuple[str, ...],
    informed: informed_lib.Informed, model: model_lib.ModelConfig,
    settings: step.Settings,
) -> dict[str, Any]:
  """`moments` of the inputs of targets `names`, stacked, of one batch."""
  mask = (labelled(batch) if informed.labelled
          else (batch.segment_ids > 0).astype(jnp.float32))
  found = {}
  if "lm_head" in names:
    hidden, _ = decoder.forward(
        model, base, None, batch.tokens, batch.positions, batch.segment_ids,
        dtype=settings.dtype, mesh=settings.mesh,
        attention=settings.attention)
    found["lm_head"] = moments(hidden, mask, informed.by_row)
  probes = {}
  for name in names:
    if name != "lm_head":
      depth, i, _ = base.layers[name].weight.shape
      probes[name] = Inputs(
          gram=jnp.zeros((depth, i, i)), total=jnp.zeros((depth, i)),
          count=jnp.zeros(depth), by_row=informed.by_row,
          mask=jnp.broadcast_to(mask, (depth, *mask.shape)))
  if probes:
    seen = _gradients(base, batch, probes, {}, model, settings).layers
    found |= {name: {key: getattr(one, key)
                     for key in ("gram", "total", "count")}
              for name, one in seen.items()}
  return found


@functools.partial(jax.jit, static_argnames=("names", "model", "settings"))
def gradients(
    base: types.Tree, batch: types.Batch, *, names: tuple[str, ...],
    model: model_lib.ModelConfig, settings: step.Settings,
) -> dict[str, jax.Array]:
  """The gradient of a batch's mean loss by the weights of targets `names`,
  stacked."""
  total = jnp.maximum(jnp.sum(batch.loss_weights), 1e-9)
  batch = dataclasses.replace(
      batch, loss_weights=batch.loss_weights / total)
  probes = {
      name: Gradient(delta=jnp.zeros(assemble.weight(base, name).shape))
      for name in names}
  layers = {k: v for k, v in probes.items() if k != "lm_head"}
  outer = {k: v for k, v in probes.items() if k == "lm_head"}
  seen = _gradients(base, batch, layers, outer, model, settings)
  return {name: one.delta for name, one in (seen.layers | seen.outer).items()}


def _gradients(base, batch, layers, outer, model, settings):
  params, frozen = adapters_lib.split(
      adapters_lib.Adapters(layers=layers, outer=outer))
  return jax.grad(step.weighted_sum)(
      params, frozen, base, batch, jax.random.key(0), model=model,
      settings=settings)


def gather(
    config: config_lib.AdapterConfig,
    batches: Sequence[types.Batch],
    *,
    base: types.Tree,
    paths: Mapping[str, Sequence[str]],
    model: model_lib.ModelConfig,
    settings: step.Settings,
    originals: starts.Originals | None = None,
) -> tuple[config_lib.AdapterConfig, dict[str, Any]]:
  """What `adapters.build` is to be given of a start that looks at rows.

  Args:
    config: the adapter block; its `init` is an informed one.
    batches: `[b, t]`, on the devices.
    base: the frozen base, as yet whole.
    paths: module paths by target.
    model: the architecture.
    settings: of a step that has no noise.
    originals: see `starts.replace`.

  Returns:
    The adapter block, with other ranks if the start moves them, and (A, B) by
    target, stacked.

  Raises:
    errors.UsageError: see `assemble.place`, and `starts.replace`.
  """
  informed = config.start().informed
  assert informed is not None
  placed = {name: p for name, p in assemble.place(config, paths).items()
            if name != "embed_tokens"}
  if "lm_head" in placed:
    assemble.head(base)  # It may be tied.
  ranks = {name: p.rank for name, p in placed.items()}
  moves = isinstance(informed, informed_lib.Eva)
  limits = starts.components(informed, ranks) if moves else ranks
  found = {}
  for names, sums in _gathered(
      informed, placed, batches, base, model, settings):
    for name in names:
      source = _source(informed, name)
      found[name] = _factors(
          informed, name, sums[source], placed[name], int(limits[name].max()),
          base, originals)
  if not moves:
    return config, found
  return _moved(config, informed, base, paths, ranks, limits, found)


def _source(informed, name):
  """Whose sums hold for a target."""
  if informed.source == "gradients":
    return name
  return informed_lib.SAME_INPUTS.get(name, name)


def _gathered(informed, placed, batches, base, model, settings) -> Iterator:
  """(targets, sums by source), a few sources at a time."""
  run: Callable = gradients
  if informed.source == "inputs":
    run = functools.partial(inputs, informed=informed)
  owners: dict[str, list[str]] = {}
  for name in placed:
    owners.setdefault(_source(informed, name), []).append(name)
  group: list[str] = []
  size = 0

  def total():
    sums = None
    for batch in batches:
      new = run(base, batch, names=tuple(group), model=model,
                settings=settings)
      sums = new if sums is None else _added(sums, new)
    if informed.source == "gradients":
      sums = jax.tree.map(lambda x: x / len(batches), sums)
    return [name for source in group for name in owners[source]], sums

  for source in owners:
    shape = assemble.weight(base, source).shape
    *lead, i, o = shape
    own = 4 * int(np.prod([1, *lead])) * i * (
        i if informed.source == "inputs" else o)
    if group and size + own > LIMIT:
      yield total()
      group, size = [], 0
    group.append(source)
    size += own
  yield total()


@functools.partial(jax.jit, donate_argnums=0)
def _added(sums, new):
  return jax.tree.map(jnp.add, sums, new)


def _factors(informed, name, sums, placement, width, base, originals):
  """What a target's sums make, stacked, on the host."""
  stacked = name in base.layers
  weight = assemble.weight(base, name)
  if not stacked:
    sums, weight = jax.tree.map(lambda x: x[None], (sums, weight))
  found: dict[int, tuple] = {}
  for layer in np.flatnonzero(placement.rank).tolist():
    w = None
    if informed.reads_weight:
      w = starts.original(name, weight, layer, originals, stacked)
    pair = _made(jax.tree.map(lambda x, n=layer: x[n], sums), w,
                 placement.rank[layer], placement.scale[layer],
                 informed=informed, width=width)
    found[layer] = jax.tree.map(mesh_lib.fetch, pair)
  nothing = jax.tree.map(np.zeros_like, pair)
  return tuple(np.stack(x) for x in zip(*(
      found.get(n, nothing) for n in range(len(placement.rank))),
      strict=True))


@functools.partial(jax.jit, static_argnames=("informed", "width"))
def _made(sums, w, rank, scale, *, informed, width):
  return informed.factors(sums, w, width, rank, scale)


def _moved(config, informed, base, paths, ranks, limits, found):
  """EVA's ranks as patterns of the block, and its A and B = 0."""
  moved = starts.redistributed(
      ranks, limits, {name: shares for name, (_, shares) in found.items()})
  # Embeddings start, and stay, as they are.
  moved |= {name: p.rank for name, p in assemble.place(config, paths).items()
            if name == "embed_tokens"}
  rank_pattern, alpha_pattern, names = {}, {}, []
  for name, values in moved.items():
    for path, rank, before in zip(
        paths[name], values.tolist(), ranks.get(name, values).tolist(),
        strict=True):
      if not rank:
        continue
      names.append(path)
      alpha = config_lib.by_pattern(path, config.alpha_pattern, config.alpha)
      if informed.adjust_scaling_factors and rank != before:
        alpha *= rank / before
      if rank != config.rank:
        rank_pattern[path] = rank
      if alpha != config.alpha:
        alpha_pattern[path] = alpha
  config = dataclasses.replace(
      config, targets=tuple(names), rank_pattern=rank_pattern,
      alpha_pattern=alpha_pattern)
  stats = {}
  for name, placement in assemble.place(config, paths).items():
    if name in found:
      width, (directions, _) = placement.width, found[name]
      used = np.arange(width) < placement.rank[:, None]
      out = assemble.weight(base, name).shape[-1]
      stats[name] = (directions[:, :, :width] * used[:, None],
                     np.zeros((len(used), width, out), np.float32))
  return config, stats
