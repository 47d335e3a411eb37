"""Accumulation, isolation of packed segments, donation, the finite guard."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax.data import packing
from lora_jax.data import templates
from lora_jax.models import decoder
from lora_jax.models import init
from lora_jax.train import loss
from lora_jax.train import optim
from lora_jax.train import step
from tests import tiny

CONFIG = tiny.CONFIGS["llama"]
KEY = jax.random.key(3)
T = 24
LENGTHS = (5, 24, 9, 14, 3, 20, 7, 11)


@pytest.fixture(scope="module")
def model():
  """(base, trainable, frozen) with dropout."""
  base = init.random_base(jax.random.key(0), CONFIG)
  tree = tiny.random_adapters(CONFIG, base, adapters_lib.AdapterConfig(
      rank=2, alpha=4.0, dropout=0.3))
  return base, *adapters_lib.split(tree)


def examples():
  rng = np.random.default_rng(0)
  return [templates.Encoded(
      tokens=rng.integers(0, CONFIG.vocab_size, n).astype(np.int32),
      weights=rng.random(n).astype(np.float32)) for n in LENGTHS]


def fill(rows, shape, length=T):
  """Rows of example numbers as a batch `[*shape, length]`."""
  flat = packing.fill(rows, examples(), length)
  return jax.tree.map(lambda x: x.reshape(*shape, length), flat)


SETTINGS = step.Settings(remat="none", noise=True)


@jax.jit
def _grads(params, frozen, base, batch):
  return step.loss_and_grads(
      params, frozen, base, batch, KEY, model=CONFIG, settings=SETTINGS)


# All eight examples, in micro-batches with more or less padding; the large
# batch is the one with a single micro-batch. Of few shapes: each is a program.
SPLITS = {
    "one row each": ([[i] for i in range(8)], (8, 1)),
    "padding in one": (
        [[i] for i in (1, 5, 3, 7, 0, 2, 4, 6)] + [[] for _ in range(4)],
        (3, 4)),
    "with empty rows": (
        [[0], [1], [2], [], [], [], [3], [], [4], [5], [6], [7]], (4, 3)),
    "an empty micro-batch": (
        [[i] for i in range(8)] + [[] for _ in range(4)], (3, 4)),
    "packed": (
        [[1], [], [], [3, 2], [], [], [5, 4], [], [], [7, 0, 6], [], []],
        (4, 3)),
}


@pytest.mark.parametrize("case", SPLITS)
def test_accumulation_is_the_large_batch(case, model):
  """Dropout is on: its masks do not depend on the split either."""
  base, params, frozen = model
  large = _grads(params, frozen, base, fill([[i] for i in range(8)], (1, 8)))
  value, grads = _grads(params, frozen, base, fill(*SPLITS[case]))
  assert abs(value - large[0]) <= 1e-6 * abs(large[0])
  for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(large[1])):
    assert jnp.linalg.norm(theirs) > 0
    assert (jnp.linalg.norm(ours - theirs)
            <= 1e-5 * jnp.linalg.norm(theirs))


def test_loss_is_the_weighted_mean(model):
  base, params, frozen = model
  batch = fill([[i] for i in range(8)], (1, 8))
  double = batch.replace(loss_weights=2.5 * batch.loss_weights)
  one, two = (_grads(params, frozen, base, b)[0] for b in (batch, double))
  assert one == pytest.approx(float(two), rel=1e-6)
  nothing = batch.replace(loss_weights=0 * batch.loss_weights)
  value, grads = _grads(params, frozen, base, nothing)
  assert value == 0
  assert all((g == 0).all() for g in jax.tree.leaves(grads))


@jax.jit
def _token_losses(params, frozen, base, batch):
  tree = adapters_lib.join(params, frozen)
  noise = adapters_lib.Noise(KEY, batch.example_ids, batch.positions)
  hidden, _ = decoder.forward(
      CONFIG, base, tree, batch.tokens, batch.positions, batch.segment_ids,
      noise=noise)
  logits = decoder.unembed(CONFIG, base, tree, hidden)
  return loss.token_nll(logits, batch.targets)


@pytest.mark.parametrize("segment", [1, 2, 3])
def test_packed_segments_are_isolated(segment, model):
  """Other tokens in one segment: the others' losses keep every bit."""
  base, params, frozen = model
  batch = fill([[7, 0, 6]], (1,))
  inside = batch.segment_ids == segment
  changed = batch.replace(tokens=np.where(
      inside, (batch.tokens + 17) % CONFIG.vocab_size, batch.tokens))
  before, after = (np.asarray(_token_losses(params, frozen, base, b))
                   for b in (batch, changed))
  others = ~inside & (batch.segment_ids > 0)
  np.testing.assert_array_equal(before[others], after[others])
  assert (before[inside] != after[inside]).mean() > 0.9


def test_packing_moves_no_dropout(model):
  """A segment's losses are those of the example alone in a row."""
  base, params, frozen = model
  packed = fill([[7, 0, 6]], (1,))
  alone = fill([[6]], (1,))
  inside = packed.segment_ids == 3
  got = np.asarray(_token_losses(params, frozen, base, packed))[inside]
  expected = np.asarray(_token_losses(params, frozen, base, alone))
  np.testing.assert_allclose(
      got, expected[alone.segment_ids == 1], rtol=0, atol=2e-5)
  moved = packed.replace(example_ids=packed.example_ids + 1)
  other = np.asarray(_token_losses(params, frozen, base, moved))[inside]
  assert np.abs(got - other).max() > 1e-2  # The masks do matter here.


def _train(state, frozen, base, batch, rate=0.01, settings=SETTINGS):
  return step.train_step(
      state, frozen, base, batch, optim.hyper(optim.OptimConfig(), rate), KEY,
      model=CONFIG, settings=settings)


def _host(tree):
  return jax.tree.map(np.array, tree)


def test_a_step_is_adamw_of_the_gradient(model):
  base, params, frozen = model
  batch = fill([[1], [3, 2], [5, 4], [7, 0, 6]], (2, 2))
  state, metrics = _train(step.init_state(params), frozen, base, batch)
  # The step's number is folded into the key.
  value, grads = jax.jit(lambda p: step.loss_and_grads(
      p, frozen, base, batch, jax.random.fold_in(KEY, 0), model=CONFIG,
      settings=SETTINGS))(params)
  norm = np.sqrt(sum(float((g ** 2).sum()) for g in jax.tree.leaves(grads)))
  assert metrics["loss"] == pytest.approx(float(value), rel=1e-6)
  assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
  assert metrics["tokens"] == sum(LENGTHS)
  assert metrics["finite"]
  assert state.step == 1
  # The first step of Adam moves by lr g / (|g| + eps), g clipped to norm 1.
  for new, old, g in zip(jax.tree.leaves(state.params),
                         jax.tree.leaves(params), jax.tree.leaves(grads)):
    g = np.asarray(g) / max(norm, 1.0)
    expected = np.asarray(old) - 0.01 * g / (np.abs(g) + 1e-8)
    clear = np.abs(g) > 1e-6  # Elsewhere the sign is rounding.
    assert clear.mean() > 0.5
    np.testing.assert_allclose(
        np.asarray(new)[clear], expected[clear], rtol=0, atol=2e-5)


def test_a_step_that_is_not_finite_changes_only_the_counter(model):
  base, params, frozen = model
  batch = fill([[1], [3, 2], [5, 4], [7, 0, 6]], (2, 2))
  state, _ = _train(step.init_state(params), frozen, base, batch)
  before = _host(state)
  weights = np.array(batch.loss_weights)
  weights[1, 0, 0] = np.nan
  state, metrics = _train(
      state, frozen, base, dataclasses.replace(batch, loss_weights=weights))
  assert not metrics["finite"]
  assert state.step == before.step + 1
  for new, old in zip(jax.tree.leaves((state.params, state.opt_state)),
                      jax.tree.leaves((before.params, before.opt_state))):
    np.testing.assert_array_equal(new, old)


def test_the_state_is_donated_and_nothing_else(model):
  base, params, frozen = model
  batch = fill([[1], [3, 2], [5, 4], [7, 0, 6]], (2, 2))
  first = step.init_state(params)
  _train(first, frozen, base, batch)
  deleted = lambda tree: [
      x.is_deleted() for x in jax.tree.leaves(tree)
      if isinstance(x, jax.Array)]
  assert all(deleted((first.params, first.opt_state)))
  # `init_state` copies: the adapters that a run starts from stay.
  assert not any(deleted((params, frozen, base)))


def test_dropout_differs_from_step_to_step(model):
  base, params, frozen = model
  batch = fill([[1], [3, 2], [5, 4], [7, 0, 6]], (2, 2))
  # A learning rate of 0: only the mask can differ.
  state, first = _train(step.init_state(params), frozen, base, batch, 0.0)
  _, second = _train(state, frozen, base, batch, 0.0)
  assert abs(first["loss"] - second["loss"]) > 1e-4


