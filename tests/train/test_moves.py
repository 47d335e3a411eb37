"""Runs whose choice is to have something in host memory, and to move it.

On a CPU that frees nothing, so that nothing is moved there unasked; that its
memories are one is kept from the tests.
"""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest

from lora_jax import api
from lora_jax import errors
from lora_jax import host as host_lib
from lora_jax.data import dataset
from lora_jax.data import templates
from lora_jax.models import init
from lora_jax.train import compiles
from lora_jax.train import loop
from lora_jax.train import memory
from lora_jax.train import step as step_lib
from tests import tiny
from tests.train import test_footprint as footprints
from tests.train import test_program as runs

FULL = step_lib.Settings(remat="full", noise=True)
# What is left open is what is offloaded.
ROWS = dict(micro_batch=1, mlp_tiles=1)
NEAR, OPTIMISER, BASE, BOTH = (
    memory.Choice("full", 1, offload, runs.B) for offload in (
        (), ("optimiser",), ("base",), ("optimiser", "base")))


@pytest.fixture(autouse=True)
def other_memory(monkeypatch):
  monkeypatch.setattr(host_lib, "ONE_MEMORY", ())
  monkeypatch.setattr(memory, "GIB", 1)  # Budgets are in bytes.


@pytest.fixture(scope="module")
def needs():
  opened = footprints.step()
  return {choice: opened.need(choice) for choice in (NEAR, OPTIMISER, BASE)}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
  """(losses, parameters) of a run that moves nothing."""
  folder = tmp_path_factory.mktemp("plain")
  outcome = fit(folder, memory=memory.MemoryConfig(**ROWS))
  assert outcome.plan is None
  return footprints.losses(folder), outcome.state.params


def copied():
  """The base, which a run may delete."""
  return jax.tree.map(lambda x: x.copy(), runs.model()[0])


def fit(folder, **changes):
  return runs.fit(folder, settings=FULL, **changes)


def matrices(base):
  return [x for x in jax.tree.leaves(base.layers) if not host_lib.stays(x)]


def moments(state):
  return [x for x in jax.tree.leaves(state.opt_state) if x.ndim]


def away(xs):
  found = {x.sharding.memory_kind for x in xs}
  assert len(xs) >= 7 and len(found) == 1
  return found == {"pinned_host"}


# Compiles three steps; the others of this file move the same, one at a time.
@pytest.mark.slow
def test_a_budget_moves_base_and_states(
    plain, needs, tmp_path, capsys, monkeypatch):
  real, base, seen, compiled = step_lib.train_step, copied(), [], []

  def counted(*args, **options):
    with compiles.CompileClock() as clock:
      found = real(*args, **options)
    compiled.append(clock.count)
    return found

  def evaluate(params, now):
    seen.append(all(x.is_deleted() for x in matrices(base)))
    assert away(matrices(now)) and not any(
        x.is_deleted() for x in jax.tree.leaves(now))
    return runs.evaluate(params, now)

  counted.lower = real.lower
  monkeypatch.setattr(step_lib, "train_step", counted)
  budget = needs[BASE] - 1
  outcome = fit(
      tmp_path / "run", base=base, donate=True, evaluate=evaluate,
      memory=memory.MemoryConfig(budget, **ROWS))
  assert outcome.plan.choice == BOTH
  assert outcome.plan.need <= budget
  assert ("memory: remat=full, offload=optimiser+base, 4 micro-batches of 1: "
          in capsys.readouterr().out)
  assert seen == [True, True]  # There are never two of it.
  assert away(matrices(outcome.base)) and away(moments(outcome.state))
  # What was measured, by descriptions, is what runs, from the first step on.
  assert compiled == [0] * runs.STEPS
  for x, y in zip(*map(jax.tree.leaves, (outcome.base, runs.model()[0])),
                  strict=True):
    np.testing.assert_array_equal(x, y)
  footprints.same(plain, tmp_path / "run", outcome)


def test_a_base_that_others_hold_is_left_to_them(plain, needs, tmp_path):
  config = memory.MemoryConfig(needs[NEAR] - 1, **ROWS)
  base = runs.model()[0]
  outcome = fit(tmp_path / "run", memory=config)
  assert outcome.plan.choice == OPTIMISER
  assert not away(matrices(base)) and away(moments(outcome.state))
  assert outcome.plan.need == needs[OPTIMISER]
  footprints.same(plain, tmp_path / "run", outcome)
  with pytest.raises(errors.UserError, match=re.escape(
      "with remat=full, offload=optimiser, 4 micro-batches of 1 a step still")):
    fit(tmp_path / "other", memory=memory.MemoryConfig(needs[BASE], **ROWS))


def test_a_base_comes_back_if_there_is_room(plain, needs, tmp_path):
  base = host_lib.placed(copied())
  outcome = fit(tmp_path / "run", base=base, memory=memory.MemoryConfig(
      needs[NEAR], **ROWS))
  assert outcome.plan.choice == NEAR and outcome.plan.need == needs[NEAR]
  assert not away(matrices(outcome.base))
  assert away(matrices(base)) and not any(
      x.is_deleted() for x in jax.tree.leaves(base))
  footprints.same(plain, tmp_path / "run", outcome)


def test_out_of_memory_moves_them_as_well(
    plain, needs, tmp_path, capsys, monkeypatch):
  real, calls = step_lib.train_step, []

  def broken(state, *args, **options):
    calls.append(options["settings"].offload)
    if len(calls) == 3:
      for x in jax.tree.leaves(state):
        x.delete()
      raise jax.errors.JaxRuntimeError(runs.EXHAUSTED)
    return real(state, *args, **options)

  broken.lower = real.lower
  monkeypatch.setattr(step_lib, "train_step", broken)
  assert needs[BASE] < memory.SMALLER * needs[NEAR] < needs[OPTIMISER]
  base = copied()
  outcome = fit(tmp_path / "run", base=base, donate=True,
                memory=memory.MemoryConfig(**ROWS))
  assert calls == [()] * 3 + [("base",)] * runs.STEPS
  assert "going on from step 0 with remat=full, offload=base" in (
      capsys.readouterr().out)
  assert all(x.is_deleted() for x in matrices(base))
  assert away(matrices(outcome.base)) and not away(moments(outcome.state))
  footprints.same(plain, tmp_path / "run", outcome)


def test_nothing_moves_where_memory_is_one(needs, tmp_path, monkeypatch):
  monkeypatch.setattr(host_lib, "ONE_MEMORY", ("cpu",))
  with pytest.raises(errors.UserError, match=re.escape(
      "with remat=full, 4 micro-batches of 1 a step still needs")):
    fit(tmp_path / "run", base=copied(), donate=True,
        memory=memory.MemoryConfig(needs[NEAR] - 1, **ROWS))


@pytest.mark.slow  # Evaluations and steps of two runs are compiled.
def test_through_the_api(tmp_path):
  """Loaded on the device, trained and evaluated from the host."""
  config = tiny.CONFIGS["llama"]
  model = api.Model(
      config=config, base=init.random_base(jax.random.key(0), config),
      tokenizer=None, fingerprint="0" * 64, source="tiny").adapt(rank=2)
  rows = dataset.of([templates.Encoded(
      tokens=np.arange(8, dtype=np.int32) + n, weights=np.ones(8, np.float32))
                     for n in range(4)])

  def train(name, budget, **options):
    return model.train(
        rows, rows, workdir=tmp_path / name, remat="full",
        memory=memory.MemoryConfig(budget, 0, 1, 1),
        config=loop.TrainConfig(steps=2, batch_size=1), **options)

  _, plain = train("near", 1 << 30)
  states = sum(x.nbytes for x in moments(plain.state))
  half = sum(x.nbytes for x in matrices(model.base)) // 2
  far, outcome = train("far", plain.plan.need - states - half, donate=True)
  assert not plain.plan.choice.offload
  assert "base" in outcome.plan.choice.offload
  assert all(x.is_deleted() for x in matrices(model.base))
  assert away(matrices(far.base))
  np.testing.assert_allclose(
      outcome.progress.best_loss, plain.progress.best_loss, rtol=1e-5)
  np.testing.assert_allclose(
      far.evaluate(rows).loss, plain.progress.best_loss, rtol=1e-5)
