"""Runs of layers: adapters whose ranks differ widely, in several stacks.

A target's adapters are one stack over all layers, padded to its largest rank.
Where that would be more than twice what they need, or many layers at either
end are not adapted at all, the layers are cut into a few runs, at the same
places for all targets, and the model is scanned run by run:

  ranks 4 4 4 64 64   "q_proj": Runs((LoRA [3, ...], LoRA [2, ...]), (3, 5))
  ranks 0 0 0  8  8   "q_proj": Runs((None,          LoRA [2, ...]), (3, 5))

Layers before the first adapted one then have no backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax import host as host_lib
from lora_jax import struct
from lora_jax import types

# At most so many runs: each is a program of its own to compile.
MOST = 4
# Layers at the start or the end that nothing adapts are a run of their own if
# they are such a part of the model.
IDLE = 0.25
# The others are cut where one stack is more than so many times what is needed.
WASTE = 2.0
# Fewer runs are taken if their stacks are no larger than this times the best.
NEAR = 1.25


@struct.dataclass
class Runs:
  """Adapters of one target.

  Attributes:
    stacks: of each run, leaves `[layers of the run, ...]`; None where the
      target is not adapted in it.
    ends: static; the number of the layer behind each run.
  """

  stacks: tuple[Any, ...]
  ends: tuple[int, ...] = struct.field(pytree_node=False, default=())


def spans(ends: Sequence[int]) -> list[tuple[int, int]]:
  """(first layer, the one behind the last) of each run."""
  return list(zip((0, *ends), ends))


def plan(
    ranks: Mapping[str, Sequence[int]], weights: Mapping[str, int]
) -> tuple[int, ...]:
  """Where to cut; one end if the layers are not to be.

  Args:
    ranks: of every layer, 0 where it is not adapted, by target.
    weights: what a rank costs, i + o of a projection, by target.
  """
  table = np.asarray([ranks[name] for name in ranks], np.int64)
  weight = np.asarray([weights[name] for name in ranks], np.float64)
  depth = table.shape[1]
  adapted = np.flatnonzero(table.any(0))
  if not adapted.size:
    return (depth,)
  first, last = adapted[0], adapted[-1] + 1
  first = int(first) if first >= IDLE * depth else 0
  last = int(last) if depth - last >= IDLE * depth else depth
  most = MOST - (first > 0) - (last < depth)
  inner = _cheapest(table[:, first:last], weight, most)
  return (*[first] * (first > 0), *(first + end for end in inner),
          *[depth] * (last < depth))


def _cheapest(table, weight, most: int) -> tuple[int, ...]:
  """The ends of at most `most` runs of layers.

  Args:
    table: ranks `[targets, l]`.
    weight: of a rank, `[targets]`.
    most: at least 1.
  """
  depth = table.shape[1]
  # Of the stacks of a run [start, stop), padded.
  cost = np.full((depth, depth + 1), np.inf)
  for start in range(depth):
    widest = np.maximum.accumulate(table[:, start:], axis=1)
    cost[start, start + 1:] = (weight @ widest) * np.arange(
        1, depth - start + 1)
  if cost[0, depth] <= WASTE * (weight @ table.sum(1)):
    return (depth,)
  # best[n][stop]: the least of n + 1 runs that end there, and their ends.
  best: list[list[tuple[float, tuple[int, ...]]]]
  best = [[(cost[0, stop], (stop,)) for stop in range(depth + 1)]]
  for _ in range(1, min(most, depth)):
    before = best[-1]
    best.append([min(
        [before[stop], *((before[cut][0] + cost[cut, stop],
                          (*before[cut][1], stop)) for cut in range(1, stop))],
        key=lambda found: found[0]) for stop in range(depth + 1)])
  enough = NEAR * best[-1][depth][0]
  return next(row[depth][1] for row in best if row[depth][0] <= enough)


def cut(layers: Mapping[str, Any], depth: int) -> list[tuple[int, int]]:
  """`spans` of a model's layers, in which no target's adapters are parted.

  Args:
    layers: of `Adapters`, complete or not.
    depth: layers of the model.
  """
  found = {depth}
  for stacked in layers.values():
    if isinstance(stacked, Runs):
      found |= {*stacked.ends}
  return spans(sorted(found))


def of_layers(
    layers: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
  """The stacks of layers `start` to `stop`, which no cut parts, by target."""
  found = {name: part(stacked, start, stop)
           for name, stacked in layers.items()}
  return {name: stack for name, stack in found.items() if stack is not None}


def part(stacked: Any, start: int, stop: int) -> Any:
  """The stack of layers `start` to `stop`, which no cut of it parts, or
  None."""
  if not isinstance(stacked, Runs):
    return _sliced(stacked, start, stop)
  for stack, (first, end) in zip(stacked.stacks, spans(stacked.ends)):
    if first <= start and stop <= end:
      return None if stack is None else _sliced(
          stack, start - first, stop - first)
  raise ValueError(f"layers {start} to {stop} lie in several runs")


def _sliced(stack, start, stop):
  return jax.tree.map(
      lambda x: x if stop - start == x.shape[0] else x[start:stop], stack)


def at(stacked: Any, layer: Any) -> tuple[Any, Any]:
  """(the stack that a layer is in or None, its number there).

  Args:
    stacked: adapters of a target.
    layer: an int, or traced if they are one stack.
  """
  if not isinstance(stacked, Runs):
    return stacked, layer
  for stack, (start, stop) in zip(stacked.stacks, spans(stacked.ends)):
    if start <= layer < stop:
      return stack, layer - start
  raise IndexError(layer)


def each(stacked: Any) -> Iterator[tuple[Any, int, int]]:
  """(stack, first layer, the one behind the last) of every stack there is."""
  if isinstance(stacked, Runs):
    for stack, (start, stop) in zip(stacked.stacks, spans(stacked.ends)):
      if stack is not None:
        yield stack, start, stop
  else:
    yield stacked, 0, jax.tree.leaves(stacked)[0].shape[0]


def mapped(function: Callable[[Any, int, int], Any], stacked: Any) -> Any:
  """With `function(stack, first layer, the one behind the last)` in place of
  every stack."""
  found = [function(*one) for one in each(stacked)]
  if not isinstance(stacked, Runs):
    return found[0]
  rest = iter(found)
  return Runs(tuple(None if stack is None else next(rest)
                    for stack in stacked.stacks), stacked.ends)


def joined(stacks: Sequence[Any], ends: tuple[int, ...]) -> Any:
  """Adapters of a target: a stack for each run, or None."""
  return stacks[0] if len(ends) == 1 else Runs(tuple(stacks), ends)


def values(stacked: Any, name: str) -> np.ndarray:
  """A scalar field of every layer's adapter on the host, `[l]`; 0 where a
  method does not have it, or a layer no adapter."""
  found = [(np.asarray(jax.device_get(getattr(stack, name, 0 * stack.rank))),
            start, stop) for stack, start, stop in each(stacked)]
  depth = stacked.ends[-1] if isinstance(stacked, Runs) else found[0][2]
  whole = np.zeros(depth, found[0][0].dtype)
  for value, start, stop in found:
    whole[start:stop] = value
  return whole


def order_of(order: Sequence[int], start: int, stop: int) -> np.ndarray:
  """Where the weights of layers `start` to `stop` are in the base's stacks.

  Args:
    order: of all layers; () if each is where its own number says.
    start, stop: of a run.
  """
  return np.asarray(order[start:stop] or range(start, stop), np.int32)


def layer(weights: types.Tree, number: types.Array) -> types.Tree:
  """One of a base's stacked weights on the device, its number traced."""
  return host_lib.on_device(jax.tree.map(
      lambda x: jax.lax.dynamic_index_in_dim(
          x, number, keepdims=False, allow_negative_indices=False), weights))
