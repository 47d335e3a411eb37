"""Batches as a pure function of (seed, step); splits; lengths; evaluation."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from lora_jax import errors
from lora_jax.data import dataset
from lora_jax.data import pipeline
from lora_jax.data import sources
from lora_jax.data import templates
from third_party import assets


def _examples(lengths, prompt=1):
  """Token j of example i is `100 i + j`; the first `prompt` have no weight."""
  return [
      templates.Encoded(
          np.arange(n, dtype=np.int32) + 100 * i,
          (np.arange(n) >= prompt).astype(np.float32), f"f:{i + 1}")
      for i, n in enumerate(lengths)]


def _random(seed, n=37, high=30):
  return _examples(np.random.default_rng(seed).integers(2, high, n))


def _equal(x, y):
  for name, value in vars(x).items():
    np.testing.assert_array_equal(value, getattr(y, name))


@pytest.mark.parametrize("packing", [True, False])
def test_pure_function_of_seed_and_step(packing):

  def make(seed):
    return pipeline.Batches(_random(0), 2, 3, 32, packing, seed, pad_id=7)

  batches, steps = make(5), 4 * make(5).steps_per_epoch
  forward = [batches.batch(s) for s in range(steps)]
  assert forward[0].tokens.shape == (3, 2, 32)
  for step in np.random.default_rng(1).permutation(steps):
    _equal(batches.batch(step), forward[step])
    _equal(make(5).batch(step), forward[step])  # As after a restart.
  ids = [batches.row_indices(s) for s in range(steps)]
  assert ids[0] != make(6).row_indices(0)
  assert ids[0] != ids[batches.steps_per_epoch]
  assert (forward[0].tokens[forward[0].segment_ids == 0] == 7).all()


def test_equal_rows_are_left_out():
  rows = _examples([3, 2, 4, 2])
  copies = [rows[0], rows[1], rows[0], rows[2], rows[1], rows[3]]
  kept = dataset.unique(copies)
  assert kept.ids.tolist() == [0, 1, 3, 5]
  assert [e.tokens.tolist() for e in kept] == [e.tokens.tolist() for e in rows]
  # The ids of what was selected before stay; the start of another is no copy.
  later = dataset.unique(dataset.of(copies).select([2, 4, 0]))
  assert later.ids.tolist() == [2, 4]
  assert len(dataset.unique(
      [rows[0], dataclasses.replace(
          rows[0], tokens=rows[0].tokens[:2])])) == 2


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_visits_examples_once(packing):
  batches = pipeline.Batches(_random(0), 2, 1, 32, packing, 0)
  rows, steps = batches.rows_per_epoch, batches.steps_per_epoch
  assert steps == rows // 2
  for epoch in range(3):
    seen = [i for s in range(epoch * steps, (epoch + 1) * steps)
            for i in batches.row_indices(s)]
    assert len(seen) == len(set(seen))
    # Only the rows of the last, incomplete batch are missing.
    if rows % 2 == 0:
      assert sorted(seen) == list(range(37))
    else:
      assert len(seen) < 37
  if packing:
    assert rows < 37
  else:
    assert rows == 37


def test_row_indices_are_those_of_the_batch():
  data = dataset.of(_random(0)).select([30, 2, 17, 5, 11, 23])
  batches = pipeline.Batches(data, 2, 2, 64, True, 0)
  for step in range(3):
    batch, ids = batches.batch(step), batches.row_indices(step)
    assert set(batch.example_ids[batch.segment_ids > 0]) == set(ids)
    assert set(ids) <= {30, 2, 17, 5, 11, 23}
    here = batch.segment_ids > 0  # Token j of example i is 100 i + j.
    np.testing.assert_array_equal(
        batch.tokens[here] // 100, batch.example_ids[here])


def test_the_only_batch_is_filled_up():
  batches = pipeline.Batches(_examples([3, 4, 5]), 4, 2, 8, False, 0)
  assert batches.steps_per_epoch == 1
  batch = batches.batch(0)
  assert batch.tokens.shape == (2, 4, 8)
  assert sorted(batches.row_indices(0)) == [0, 1, 2]
  assert (batch.segment_ids.reshape(8, 8)[3:] == 0).all()
  assert batch.loss_weights.sum() == 2 + 3 + 4
  assert sorted(batches.row_indices(1)) == [0, 1, 2]


def test_packed_rows_are_not_sorted_by_length():
  """Best-fit decreasing would give long examples first."""
  lengths = np.random.default_rng(0).integers(2, 64, 400)
  batches = pipeline.Batches(_examples(lengths), 4, 1, 64, True, 0)
  longest = [lengths[batches.row_indices(s)].max()
             for s in range(batches.steps_per_epoch)]
  # Unshuffled, it falls from step to step: the correlation is -0.99.
  assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.5


def test_permutation_is_pinned():
  """A change of these numbers would change every published run's order."""
  assert dataset.permutation(8, 0, 0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
  assert dataset.permutation(8, 0, 1).tolist() == [1, 2, 3, 5, 0, 4, 7, 6]
  assert dataset.permutation(8, 1, 0).tolist() == [3, 5, 2, 7, 0, 6, 1, 4]
  assert sorted(dataset.permutation(1000, 3, 4)) == list(range(1000))


def test_batches_errors():
  def fails(match, lengths=(3,), batch_size=1, accumulation=1, max_length=8,
            seed=0):
    with pytest.raises(errors.UserError, match=match):
      pipeline.Batches(_examples(lengths), batch_size, accumulation,
                       max_length, True, seed)

  fails("train.batch_size=0: must be at least 1", batch_size=0)
  fails("train.accumulation=0", accumulation=0)
  fails("data.max_length=0", max_length=0)
  fails("seed=-1: must be at least 0", seed=-1)
  fails("no rows to train on", lengths=())
  fails("f:1: 9 tokens, more than", lengths=(9,))


def test_split():
  train, held = dataset.split(10, 3, 0)
  assert len(train) == 7
  assert sorted([*train, *held]) == list(range(10))
  assert held.tolist() == sorted(held)
  np.testing.assert_array_equal(dataset.split(10, 0.3, 0)[1], held)
  assert dataset.split(1000, 100, 1)[1].tolist() != dataset.split(
      1000, 100, 0)[1].tolist()
  assert dataset.split(10, 0, 0)[1].tolist() == []
  for holdout in (10, 11, -1, 1.0):
    with pytest.raises(errors.UserError, match=r"data\.holdout="):
      dataset.split(10, holdout, 0)


def test_fit():
  encoded = _examples([4, 9, 12, 8], prompt=3)
  encoded[2] = _examples([12], prompt=8)[0]
  with pytest.raises(errors.UserError, match=(
      r"f:2: 9 tokens, more than data.max_length=8 \(as are 2 of 4 rows\); "
      r'raise it to 12, or set data.overlong to "truncate" or "drop"')):
    dataset.fit(encoded, 8)
  data, counts = dataset.fit(encoded, 8, "drop")
  assert counts == dataset.Counts(kept=2, truncated=0, dropped=2)
  assert data.ids.tolist() == [0, 3]
  data, counts = dataset.fit(encoded, 8, "truncate")
  assert counts == dataset.Counts(kept=3, truncated=1, dropped=1)
  assert data.ids.tolist() == [0, 1, 3]
  assert data[1].tokens.tolist() == list(range(100, 108))
  assert data[1].weights.tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
  assert len(encoded[1].tokens) == 9  # The input is left as it is.
  # Positions of a selection are not its ids.
  assert dataset.fit(data.select([2, 0]), 8)[0].ids.tolist() == [3, 0]
  with pytest.raises(errors.UserError, match='did you mean "truncate"'):
    dataset.fit(encoded, 8, "truncat")
  with pytest.raises(errors.UserError, match="none of 4 rows fits"):
    dataset.fit(encoded, 2, "drop")


def test_eval_batches():
  encoded = _random(3, n=23, high=90)
  seen, shapes = [], set()
  for batch, rows in pipeline.eval_batches(encoded, 4, pad_id=1):
    shapes.add(batch.tokens.shape)
    assert len(rows) <= 4
    seen += rows.tolist()
    for r, i in enumerate(rows):
      here = batch.example_ids[r] == i
      np.testing.assert_array_equal(batch.tokens[r, here], encoded[i].tokens)
      assert batch.loss_weights[r].sum() == encoded[i].weights[1:].sum()
      assert set(batch.segment_ids[r]) <= {0, 1}
    assert (batch.segment_ids[len(rows):] == 0).all()
  assert sorted(seen) == list(range(23))
  assert shapes == {(4, 64), (4, 128)}
  shapes = {b.tokens.shape for b, _ in pipeline.eval_batches(encoded, 4, 100)}
  assert shapes == {(4, 64), (4, 100)}
  with pytest.raises(ValueError, match="more than max_length=50"):
    list(pipeline.eval_batches(encoded, 4, 50))
  data = dataset.of(encoded).select([7, 3])
  (batch, rows), = pipeline.eval_batches(data, 2)
  assert data.ids[rows].tolist() == batch.example_ids[:, 0].tolist()


def test_length_statistics():
  stats = dataset.length_statistics(_examples([2, 4, 6, 28], prompt=2), (4, 9))
  assert stats == dataset.LengthStatistics(
      count=4, tokens=40, weighted=0 + 2 + 4 + 26, minimum=2, median=5.0,
      p95=float(np.percentile([2, 4, 6, 28], 95)), maximum=28,
      share_over={4: 0.5, 9: 0.25})
  assert str(stats) == (
      "4 rows, 40 tokens (32 with loss); a row: min 2, median 5, p95 24.7, "
      "max 28, 50.0% over 4, 25.0% over 9")


def test_alpaca_with_smollm2(smollm2):
  """The real thing: every row encoded, and its answer exactly in the loss."""
  examples = sources.read(assets.fetch("alpaca_en_demo"))
  encoded = [templates.encode(e, smollm2) for e in examples]
  for example, e in zip(examples, encoded):
    answer = smollm2.decode(e.tokens[e.weights > 0])
    assert answer == f"{example.messages[-1]['content']}<|im_end|>"
  stats = dataset.length_statistics(encoded, (128, 256))
  assert (stats.count, stats.tokens, stats.weighted) == (999, 200471, 150136)
  assert round(stats.share_over[128] * 999) == 999 - 418
  assert round(stats.share_over[256] * 999) == 999 - 684
  data, counts = dataset.fit(encoded, 256, "drop")
  assert counts.dropped == 315
  batches = pipeline.Batches(data, 4, 1, 256, True, 0)
  assert batches.rows_per_epoch == 335  # 96% full.
