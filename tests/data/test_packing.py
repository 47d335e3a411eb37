"""Packing: a hand-worked case, invariants on random cases, an oracle."""

from __future__ import annotations

import bisect
import time

import numpy as np
import pytest

from lora_jax.data import packing
from lora_jax.data import templates


def _best_fit_decreasing(lengths, max_length):
  """The textbook algorithm over a sorted list; returns the rows' fill."""
  rooms, rows = [], []
  for n in sorted(lengths, reverse=True):
    at = bisect.bisect_left(rooms, n)
    room = rooms.pop(at) if at < len(rooms) else max_length
    rows.append(n)
    bisect.insort(rooms, room - n)
  return sorted(max_length - r for r in rooms)


def test_by_hand():
  # Longest first: 7 and 6 open rows, 4 fits 6 exactly, 3 fits 7 exactly.
  assert packing.pack([3, 6, 4, 7, 1], 10) == [[3, 0], [1, 2], [4]]
  # Best fit: 2 goes to the row with room 2, not to the one with room 4.
  assert packing.pack([6, 8, 2], 10) == [[1, 2], [0]]
  assert packing.pack([5, 5, 5, 5], 10) == [[0, 1], [2, 3]]
  assert packing.pack([], 10) == []
  assert packing.pack([1, 1], 1) == [[0], [1]]


@pytest.mark.parametrize("seed", range(20))
def test_invariants(seed):
  rng = np.random.default_rng(seed)
  max_length = int(rng.integers(1, 300))
  lengths = rng.integers(1, max_length + 1, size=int(rng.integers(1, 400)))
  rows = packing.pack(lengths, max_length)
  assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
  fill = sorted(int(lengths[row].sum()) for row in rows)
  assert fill[-1] <= max_length
  assert fill == _best_fit_decreasing(lengths.tolist(), max_length)
  assert rows == packing.pack(lengths, max_length)
  # The number of rows is that of any other order: epochs are equally long.
  assert len(packing.pack(rng.permutation(lengths), max_length)) == len(rows)


def test_out_of_range():
  with pytest.raises(ValueError, match=r"from 1 to 11 do not lie in 1\.\.10"):
    packing.pack([1, 11], 10)
  with pytest.raises(ValueError, match="from 0 to 1"):
    packing.pack([1, 0], 10)


def test_many():
  lengths = np.random.default_rng(0).integers(1, 4096, size=50_000)
  start = time.process_time()
  rows = packing.pack(lengths, 4096)
  assert time.process_time() - start < 10
  assert lengths.sum() / (4096 * len(rows)) > 0.98


def _encoded(*tokens, weights=None):
  return templates.Encoded(
      np.asarray(tokens, np.int32),
      np.asarray(weights or [1] * len(tokens), np.float32))


def test_fill_by_hand():
  encoded = [_encoded(5, 6, 7, weights=[0, 0, 1]), _encoded(8, 9), _encoded(4)]
  batch = packing.fill([[1, 0], [], [2]], encoded, 6, [10, 20, 30], pad_id=3)
  np.testing.assert_array_equal(
      batch.tokens, [[8, 9, 5, 6, 7, 3], [3] * 6, [4, 3, 3, 3, 3, 3]])
  np.testing.assert_array_equal(
      batch.targets, [[9, 3, 6, 7, 3, 3], [3] * 6, [3] * 6])
  np.testing.assert_array_equal(
      batch.loss_weights, [[1, 0, 0, 1, 0, 0], [0] * 6, [0] * 6])
  np.testing.assert_array_equal(
      batch.positions, [[0, 1, 0, 1, 2, 0], [0] * 6, [0] * 6])
  np.testing.assert_array_equal(
      batch.segment_ids, [[1, 1, 2, 2, 2, 0], [0] * 6, [1, 0, 0, 0, 0, 0]])
  np.testing.assert_array_equal(
      batch.example_ids,
      [[20, 20, 10, 10, 10, -1], [-1] * 6, [30, -1, -1, -1, -1, -1]])
  dtypes = {k: v.dtype for k, v in vars(batch).items()}
  assert dtypes.pop("loss_weights") == np.float32
  assert set(dtypes.values()) == {np.dtype(np.int32)}


@pytest.mark.parametrize("seed", range(5))
def test_every_pair_is_there_once(seed):
  """The weighted (token, target) pairs equal those of the examples alone."""
  rng = np.random.default_rng(seed)
  encoded = [
      _encoded(*rng.integers(1, 99, n), weights=rng.integers(0, 2, n).tolist())
      for n in rng.integers(1, 20, 50)]
  rows = packing.pack([len(e.tokens) for e in encoded], 24)
  batch = packing.fill(rows, encoded, 24)
  for i, e in enumerate(encoded):
    here = batch.example_ids == i
    np.testing.assert_array_equal(batch.tokens[here], e.tokens)
    np.testing.assert_array_equal(batch.targets[here][:-1], e.tokens[1:])
    np.testing.assert_array_equal(
        batch.loss_weights[here], [*e.weights[1:], 0])
    np.testing.assert_array_equal(
        batch.positions[here], np.arange(len(e.tokens)))
    assert len(set(batch.segment_ids[here])) == 1
    assert len(set(np.nonzero(here)[0])) == 1
  assert (batch.loss_weights[batch.segment_ids == 0] == 0).all()


def test_fill_too_long():
  with pytest.raises(ValueError, match="row 0 holds more than max_length=2"):
    packing.fill([[0]], [_encoded(1, 2, 3)], 2)
