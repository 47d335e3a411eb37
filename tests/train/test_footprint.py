"""What XLA says a step takes, against what it must, and runs chosen by it."""

from __future__ import annotations

import dataclasses
import re
import types as python_types

import jax
import numpy as np
import pytest

from lora_jax import errors
from lora_jax import host as host_lib
from lora_jax.train import compiles
from lora_jax.train import footprint
from lora_jax.train import memory
from lora_jax.train import optim
from lora_jax.train import step as step_lib
from tests.train import test_program as runs

NAMED, FULL = memory.Choice("named"), memory.Choice("full")
CONFIG, B, T = runs.CONFIG, runs.B, runs.T


def step(**changes):
  task = runs.task(**changes)
  return footprint.Step(
      task.model, task.settings, step_lib.init_state(runs.model()[1]),
      task.frozen, task.base, task.batches.batch(0),
      optim.hyper(task.optim, 1e-3), task.key)


@pytest.fixture(scope="module")
def needs():
  """Bytes of the two programs that the tests of this module run."""
  opened = step()
  return {choice: opened.need(choice) for choice in (NAMED, FULL)}


def test_bounds_by_hand():
  opened = step()
  arguments = sum(
      x.size * x.dtype.itemsize for x in jax.tree.leaves(opened.trees))
  assert opened.bound(FULL) - arguments == 4 * CONFIG.n_layers * B * T * (
      CONFIG.d_model)  # The layers' inputs.
  heads, kv = (n * CONFIG.head_dim
               for n in (CONFIG.n_heads, CONFIG.n_kv_heads))
  kept = 2 * CONFIG.d_model + 2 * heads + 2 * kv + 2 * CONFIG.d_ff
  # One more input than there are layers; see `models.tape`.
  whole = 4 * B * T * (CONFIG.n_layers * kept + CONFIG.d_model)
  assert opened.bound(NAMED) - arguments == whole
  assert opened.bound(memory.Choice("named", parts=4)) - arguments == (
      whole // 4)
  assert (opened.bound(memory.Choice("named", mlp_tiles=4)) - arguments
          == whole - 4 * CONFIG.n_layers * B * T * 2 * CONFIG.d_ff)
  assert opened.bound(memory.Choice("none")) > opened.bound(NAMED)
  # On the host neither counts, but vectors and scalars are never there.
  every = tuple(memory.OFFLOAD)
  matrices, moments = (
      [x for x in jax.tree.leaves(tree) if x.ndim >= least] for tree, least in
      ((opened.base.layers, 3), (opened.state.opt_state, 1)))
  assert len(matrices) == 7 and len(moments) == 28
  assert opened.bound(memory.Choice("full", offload=every)) == (
      arguments - 4 * sum(x.size for x in matrices + moments))
  bytes_of = footprint.resident
  far = opened.described(memory.Choice("full", offload=every))
  assert bytes_of(far) + bytes_of(far, away=True) == arguments
  # Nothing was moved, and a base that is away counts as one that comes back.
  assert bytes_of(opened.trees) == arguments
  back = dataclasses.replace(
      opened, base=host_lib.placed(opened.base), _known={})
  assert bytes_of(back.trees) < arguments
  assert back.bound(NAMED) == opened.bound(NAMED)
  abstract = jax.eval_shape(lambda: opened.base)
  assert bytes_of(abstract) == bytes_of(opened.base)


def test_a_bound_is_one(needs):
  opened = step()
  for choice, need in needs.items():
    assert opened.bound(choice) < need < 10 * opened.bound(choice)
  assert needs[FULL] < memory.SMALLER * needs[NAMED]


def losses(folder):
  return [x["loss"] for x in runs.lines(folder) if "loss" in x]


@pytest.fixture(scope="module")
def plain(needs, tmp_path_factory):
  """(losses, parameters) of a run that nothing was chosen for."""
  del needs
  folder = tmp_path_factory.mktemp("plain")
  outcome = runs.fit(folder)
  assert outcome.plan is None
  return losses(folder), outcome.state.params


def same(plain, folder, outcome):
  np.testing.assert_allclose(losses(folder), plain[0], rtol=1e-5)
  for ours, theirs in zip(jax.tree.leaves(outcome.state.params),
                          jax.tree.leaves(plain[1]), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)


def test_a_budget_chooses_the_program(
    plain, needs, tmp_path, capsys, monkeypatch):
  budget = needs[NAMED] - 1
  assert step().bound(memory.Choice("none")) > budget  # Not compiled.
  monkeypatch.setattr(memory, "GIB", 2**20)
  outcome = runs.fit(tmp_path / "run", memory=memory.MemoryConfig(
      budget_gib=budget / 2**20))
  assert outcome.plan == memory.Plan(
      FULL, needs[FULL], True,
      (memory.Choice("none"), step().bound(memory.Choice("none"))))
  found = re.findall(r"^memory: remat=full: ([\d.]+) of ([\d.]+) GiB "
                     r"\(remat=none would need ([\d.]+)\)$",
                     capsys.readouterr().out, re.MULTILINE)
  assert found == [tuple(f"{n / 2**20:.1f}" for n in (
      needs[FULL], budget, outcome.plan.refused[1]))]
  same(plain, tmp_path / "run", outcome)


def test_the_program_that_was_measured_is_the_one_that_runs(needs):
  opened = step()
  with compiles.CompileClock() as clock:
    step_lib.train_step(
        *opened.trees, FULL.split(opened.batch), opened.hyper, opened.key,
        model=CONFIG, settings=FULL.settings(opened.settings))
  assert clock.count == 0


def test_a_budget_that_nothing_fits(needs, tmp_path):
  config = memory.MemoryConfig(0.0001, micro_batch=B, mlp_tiles=1)
  with pytest.raises(errors.UserError, match=re.escape(
      "memory.budget_gib=0.0001: with remat=full a step still needs ")):
    runs.fit(tmp_path / "run", memory=config,
             settings=step_lib.Settings(remat="full", noise=True))


def test_a_device_that_says_nothing(plain, tmp_path, capsys):
  outcome = runs.fit(tmp_path / "run", memory=memory.MemoryConfig(auto=True))
  assert "this device does not say what it has" in capsys.readouterr().out
  assert losses(tmp_path / "run") == plain[0]
  assert outcome.plan is None


def test_out_of_memory_in_the_first_step(
    plain, needs, tmp_path, capsys, monkeypatch):
  """The real programs: the state is whole after the failure."""
  del needs
  real, calls = step_lib.train_step, []

  def broken(state, *args, **options):
    calls.append(options["settings"].remat)
    if len(calls) == 1:
      for x in jax.tree.leaves(state):
        x.delete()
      raise jax.errors.JaxRuntimeError(runs.EXHAUSTED)
    return real(state, *args, **options)

  broken.lower = real.lower
  monkeypatch.setattr(step_lib, "train_step", broken)
  outcome = runs.fit(tmp_path / "run")
  assert calls == ["named"] + ["full"] * runs.STEPS
  assert "ran out of it with remat=named" in capsys.readouterr().out
  same(plain, tmp_path / "run", outcome)


def test_room(monkeypatch):
  """The least of what the devices have and the budget, less what is taken."""

  def room(budget, *stats):
    monkeypatch.setattr(jax, "local_devices", lambda: [
        python_types.SimpleNamespace(memory_stats=lambda s=s: s)
        for s in stats])
    return footprint.room(memory.MemoryConfig(budget), 1000)

  gib = 2**30
  assert room(0.0, None) is None
  assert room(2.0, None) == footprint.Room(2 * gib, 0)
  stats = {"bytes_limit": 100 * gib, "bytes_in_use": 5000}
  other = {"bytes_limit": 50 * gib, "bytes_in_use": 1500}
  assert room(0.0, stats) == footprint.Room(97 * gib, 4000)
  assert room(0.0, stats, other).total == int(48.5 * gib)
  assert room(0.0, other, stats).free == int(48.5 * gib) - 4000
  assert room(24.0, stats).total == 24 * gib
  # A budget makes no device larger.
  assert room(60.0, other).total == int(48.5 * gib)
