"""Packing: several examples in one row of tokens, isolated by segment ids."""

from __future__ import annotations

import collections
from collections.abc import Sequence

import numpy as np

from lora_jax import types
from lora_jax.data import templates


def pack(
    lengths: Sequence[int] | np.ndarray, max_length: int,
) -> list[list[int]]:
  """Best-fit decreasing bin packing (Ding et al. 2024, arXiv:2404.10830).

  The longest item goes first, into the open row with the least room that
  still takes it. A segment tree over capacities finds that row, so that n
  items cost O(n log max_length) beyond the sort. The number of rows depends
  on the multiset of lengths only, not on their order.

  Args:
    lengths: tokens of each example, [n], each in 1..max_length.
    max_length: tokens of a row.

  Returns:
    The examples of each row, as indices into `lengths`; ties keep the order
    of `lengths`.

  Raises:
    ValueError: a length out of range.
  """
  needs = np.asarray(lengths, np.int64).reshape(-1)
  if needs.size and not (needs.min() > 0 and needs.max() <= max_length):
    raise ValueError(
        f"lengths from {needs.min()} to {needs.max()} do not lie in "
        f"1..{max_length}")
  leaves = 1 << max_length.bit_length()  # > max_length.
  # tree[leaves + c] is c while some row has room c; a node is its maximum.
  tree = [0] * (2 * leaves)

  def update(room: int, value: int) -> None:
    node = leaves + room
    tree[node] = value
    while node > 1:
      node //= 2
      tree[node] = max(tree[2 * node], tree[2 * node + 1])

  rows: list[list[int]] = []
  open_rows: dict[int, collections.deque[int]] = collections.defaultdict(
      collections.deque)
  for i in np.argsort(-needs, kind="stable").tolist():
    need = int(needs[i])
    if tree[1] >= need:
      node = 1
      while node < leaves:  # The leftmost leaf with enough room.
        node = 2 * node if tree[2 * node] >= need else 2 * node + 1
      room = node - leaves
      row = open_rows[room].popleft()
      if not open_rows[room]:
        update(room, 0)
      rows[row].append(i)
    else:
      room, row = max_length, len(rows)
      rows.append([i])
    if left := room - need:
      open_rows[left].append(row)
      if len(open_rows[left]) == 1:
        update(left, left)
  return rows


def fill(
    rows: Sequence[Sequence[int]], encoded: Sequence[templates.Encoded],
    max_length: int, example_ids: Sequence[int] | np.ndarray | None = None,
    pad_id: int = 0,
) -> types.Batch:
  """Rows of examples as arrays.

  Args:
    rows: for each of the b rows, the indices into `encoded` it holds; an
      empty one is all padding.
    encoded: the examples.
    max_length: t, tokens of a row.
    example_ids: int [n], the global index of each of `encoded`; by default
      its index.
    pad_id: token id of the padding; it carries no loss, so any id will do.

  Returns:
    A numpy `Batch` [b, t]. Targets are shifted within each segment, and a
    segment's last token has the target `pad_id` with weight 0. Padding has
    segment 0, position 0, weight 0 and example -1.

  Raises:
    ValueError: a row is longer than `max_length`.
  """
  shape = (len(rows), max_length)
  tokens = np.full(shape, pad_id, np.int32)
  targets = np.full(shape, pad_id, np.int32)
  weights = np.zeros(shape, np.float32)
  positions = np.zeros(shape, np.int32)
  segments = np.zeros(shape, np.int32)
  examples = np.full(shape, -1, np.int32)
  for r, row in enumerate(rows):
    at = 0
    for segment, i in enumerate(row, 1):
      n = len(encoded[i].tokens)
      if at + n > max_length:
        raise ValueError(
            f"row {r} holds more than max_length={max_length} tokens")
      here = slice(at, at + n)
      tokens[r, here] = encoded[i].tokens
      # Virtual tokens have ids that no logit is of, and weight 0 as such.
      labels = encoded[i].labels
      after = (encoded[i].tokens if labels is None else labels)[1:]
      targets[r, at:at + n - 1] = np.where(after < 0, pad_id, after)
      weights[r, at:at + n - 1] = encoded[i].weights[1:]
      positions[r, here] = np.arange(n)
      segments[r, here] = segment
      examples[r, here] = i if example_ids is None else example_ids[i]
      at += n
  return types.Batch(
      tokens=tokens, targets=targets, loss_weights=weights,
      positions=positions, segment_ids=segments, example_ids=examples)
