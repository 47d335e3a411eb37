"""Batches of token rows: training as a function of (seed, step), evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses

import numpy as np

from lora_jax import errors
from lora_jax import types
from lora_jax.data import dataset
from lora_jax.data import packing as packing_lib
from lora_jax.data import templates


class Batches:
  """Training batches `[a, b, t]`, a pure function of (seed, step).

  Every epoch visits the examples in another order. With packing, the epoch's
  examples are packed in that order and the packed rows are shuffled. Rows
  that fill no whole batch at an epoch's end are left out of that epoch,
  unless they are all there is: then the batch is filled with empty rows.

  Attributes:
    rows_per_epoch: rows (packed or single examples) of an epoch.
    steps_per_epoch: whole batches of an epoch, at least 1.
  """

  def __init__(
      self, encoded: Sequence[templates.Encoded], batch_size: int,
      accumulation: int, max_length: int, packing: bool, seed: int, *,
      pad_id: int = 0,
  ):
    """Plans the first epoch.

    Args:
      encoded: the examples (a `dataset.Dataset` brings its ids), each at most
        `max_length` tokens: see `dataset.fit`.
      batch_size: b, rows of a microbatch.
      accumulation: a, microbatches of a step.
      max_length: t, tokens of a row.
      packing: several examples a row.
      seed: of the order, not negative.
      pad_id: token id of the padding.

    Raises:
      UserError: no examples, sizes below 1, or an over-long example.
    """
    for name, value, least in (("train.batch_size", batch_size, 1),
                               ("train.accumulation", accumulation, 1),
                               ("data.max_length", max_length, 1),
                               ("seed", seed, 0)):
      if value < least:
        raise errors.UserError(f"{name}={value}: must be at least {least}")
    if not len(encoded):
      raise errors.UserError("there are no rows to train on; check data.path "
                             "and data.holdout")
    self._data, _ = dataset.fit(encoded, max_length)
    self._lengths = self._data.lengths
    self._shape = (accumulation, batch_size)
    self._max_length, self._packing = max_length, packing
    self._seed, self._pad_id = seed, pad_id
    self._plan = (0, self._rows(0))
    self.rows_per_epoch = len(self._plan[1])
    self.steps_per_epoch = max(
        1, self.rows_per_epoch // (accumulation * batch_size))

  def batch(self, step: int) -> types.Batch:
    """The numpy batch [a, b, t] of a step (from 0)."""
    flat = packing_lib.fill(
        self._step_rows(step), self._data, self._max_length, self._data.ids,
        self._pad_id)
    fields = {f.name: getattr(flat, f.name).reshape(*self._shape, -1)
              for f in dataclasses.fields(flat)}
    return types.Batch(**fields)

  def row_indices(self, step: int) -> list[int]:
    """Global ids of the examples of a step, in the order of its rows."""
    return [int(self._data.ids[i])
            for row in self._step_rows(step) for i in row]

  def _step_rows(self, step: int) -> list[list[int]]:
    epoch, at = divmod(step, self.steps_per_epoch)
    if self._plan[0] != epoch:
      self._plan = (epoch, self._rows(epoch))
    size = self._shape[0] * self._shape[1]
    rows = self._plan[1][at * size:(at + 1) * size]
    return rows + [[] for _ in range(size - len(rows))]

  def _rows(self, epoch: int) -> list[list[int]]:
    """The rows of an epoch, as positions in the dataset."""
    order = dataset.permutation(len(self._data), self._seed, epoch)
    if not self._packing:
      return [[int(i)] for i in order]
    rows = packing_lib.pack(self._lengths[order], self._max_length)
    # Best-fit decreasing lists long examples first: shuffle the rows, too.
    shuffled = dataset.permutation(len(rows), self._seed, epoch, stream=2)
    return [[int(order[i]) for i in rows[r]] for r in shuffled]


def eval_batches(
    encoded: Sequence[templates.Encoded], batch_size: int,
    max_length: int | None = None, multiple: int = 64, pad_id: int = 0,
) -> Iterator[tuple[types.Batch, np.ndarray]]:
  """Every example exactly once, one a row, short ones first.

  Args:
    encoded: the examples.
    batch_size: b; the last batch is filled up with empty rows.
    max_length: an upper limit of t; none by default.
    multiple: t is a multiple of it (or `max_length`), which bounds the number
      of shapes to compile.
    pad_id: token id of the padding.

  Yields:
    A numpy batch [b, t], and the positions in `encoded` of its first rows,
    int64 [at most b].

  Raises:
    ValueError: an example is longer than `max_length`: see `dataset.fit`.
  """
  data = dataset.of(encoded)
  order = np.argsort(data.lengths, kind="stable")
  for at in range(0, len(order), batch_size):
    rows = order[at:at + batch_size]
    length = -(-int(data.lengths[rows[-1]]) // multiple) * multiple
    if max_length is not None:
      length = min(length, max_length)
    filled = [[int(i)] for i in rows]
    filled += [[] for _ in range(batch_size - len(rows))]
    yield packing_lib.fill(filled, data, length, data.ids, pad_id), rows
