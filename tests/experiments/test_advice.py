"""The sentence about overfitting, for curves made by hand."""

from __future__ import annotations

import pytest

from experiments import advice

CONFIG = {"adapter": {"rank": 16, "dropout": 0.0}}


def lines(held_out, train=None):
  """Evaluations every 10 steps from 0, and batches of every step."""
  found = [{"step": 10 * i, "eval_loss": v} for i, v in enumerate(held_out)]
  for i in range(1, 10 * (len(held_out) - 1) + 1):
    found.append({"step": i, "loss": (train or held_out)[min(
        len(held_out) - 1, (i + 5) // 10)]})
  return sorted(found, key=lambda x: x["step"])


@pytest.mark.parametrize("held_out, train, parts", [
    ([2.0, 1.5, 1.4, 1.6], [2.0, 1.4, 1.0, 0.5],
     ["overfits", "best at step 20 (1.4000)", "0.2000 higher after 30",
      "train.steps=20", "a lower adapter.rank than 16",
      "adapter.dropout=0.1"]),
    ([2.0, 1.5, 1.42, 1.418, 1.417], [2.0, 1.5, 1.3, 1.2, 1.1],
     ["begins to overfit", "0.317 above", "0.317 more than at step 10"]),
    ([2.0, 1.8, 1.6, 1.4, 1.2], None, ["not done", "fell by 0.4000 of 0.8000"]),
    ([2.0, 1.5, 1.402, 1.401, 1.4], None, ["fits", "2.0000 to 1.4000"]),
    ([2.0, 2.1, 2.4], None, ["never fell", "lower optim.learning_rate"]),
    ([2.0, 2.0, 2.001], None, ["never fell", "raise optim.learning_rate"]),
])
def test_the_sentence_and_its_evidence(held_out, train, parts):
  text = advice.advice(lines(held_out, train), CONFIG)["advice"]
  for part in parts:
    assert part in text


def test_the_gap_is_that_of_batches_around():
  points = advice.gap(lines([2.0, 1.5, 1.4], [2.0, 1.2, 1.0]))
  assert points == [(10, 1.5, 1.2), (20, 1.4, 1.0)]
  found = advice.advice(lines([2.0, 1.5, 1.4], [2.0, 1.2, 1.0]))
  assert found["train_eval_gap"] == pytest.approx(0.4)
  assert found["train_eval_gap_change"] == pytest.approx(0.1)


def test_nothing_is_said_without_evaluations():
  assert advice.advice([{"step": 1, "loss": 1.0}]) == {}
  assert advice.advice([{"step": 0, "eval_loss": 1.0}]) == {}
