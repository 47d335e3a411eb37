"""A step chosen to fit; and running out of memory loses nothing."""

from __future__ import annotations

import dataclasses
import functools
import json
import types as python_types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax import types
from lora_jax.models import init
from lora_jax.train import loop
from lora_jax.train import memory
from lora_jax.train import optim
from lora_jax.train import program
from lora_jax.train import step as step_lib
from tests import tiny

CONFIG = dataclasses.replace(
    tiny.CONFIGS["llama"], d_model=32, d_ff=128, n_layers=10)
B, T, STEPS = 4, 32, 6
REAL_STEP = step_lib.train_step
EXHAUSTED = "RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes."


@functools.cache
def model():
  """(base, trainable, frozen)."""
  base = init.random_base(jax.random.key(0), CONFIG)
  tree = tiny.random_adapters(CONFIG, base, adapters_lib.AdapterConfig(
      rank=2, alpha=4.0, dropout=0.2))
  return base, *adapters_lib.split(tree)


class Batches:
  """Other tokens and ids every step; half of the weights are zero."""

  def batch(self, step):
    rng = np.random.default_rng(step)
    draw = lambda high: rng.integers(0, high, (1, B, T)).astype(np.int32)
    ids = np.broadcast_to(
        np.arange(B, dtype=np.int32)[:, None] + B * step, (1, B, T))
    return types.Batch(
        tokens=draw(CONFIG.vocab_size), targets=draw(CONFIG.vocab_size),
        loss_weights=draw(2).astype(np.float32),
        positions=np.tile(np.arange(T, dtype=np.int32), (1, B, 1)),
        segment_ids=np.ones((1, B, T), np.int32), example_ids=ids)

  def row_indices(self, step):
    return np.arange(B) + B * step


def task(**changes):
  base, _, frozen = model()
  return loop.Task(**dict(
      model=CONFIG, base=base, frozen=frozen, batches=Batches(),
      learning_rates=np.full(STEPS, 1e-3, np.float32),
      optim=optim.OptimConfig(), key=jax.random.key(3),
      settings=step_lib.Settings(remat="auto", noise=True)) | changes)


def fit(folder, every=0, **changes):
  return loop.fit(
      task(**changes), step_lib.init_state(model()[1]), loop.TrainConfig(
          steps=STEPS, batch_size=B, checkpoint_every=every,
          eval_every=every), folder)


def lines(folder):
  """metrics.jsonl without the speeds."""
  text = (folder / "metrics.jsonl").read_text().splitlines()
  return [{k: v for k, v in json.loads(x).items() if k != "tokens_per_s"}
          for x in text]


class Late:
  """A number that the device has no memory for, which it tells when asked."""

  def __array__(self, *unused, **unused_too):
    raise jax.errors.JaxRuntimeError(EXHAUSTED)


class Device:
  """Stands in for `train_step`: params become a function of all batches.

  Attributes:
    fail: calls, counted from 0, that run out of memory.
    late: whether they tell only when their metrics are read.
    calls: (remat, shape of the batch) of every call.
  """

  def __init__(self, *fail, late=False):
    self.fail, self.late, self.calls = fail, late, []

  def __call__(self, state, frozen, base, batch, hyper, key, *, model,
               settings):
    del frozen, base, hyper, key, model
    fails = len(self.calls) in self.fail
    self.calls.append((settings.remat, batch.tokens.shape))
    old = jax.tree.map(np.array, state)
    for x in jax.tree.leaves(state):  # Donated, whatever comes of it.
      x.delete()
    if fails and not self.late:
      raise jax.errors.JaxRuntimeError(EXHAUSTED)
    drift = np.float32(batch.tokens.mean())
    new = old.replace(step=old.step + 1, params=jax.tree.map(
        lambda p: 0.5 * p + drift, old.params))
    metrics = {"loss": drift, "grad_norm": drift, "finite": np.bool_(True),
               "tokens": np.int32(batch.tokens.size)}
    if fails:
      # What comes out of a failed step cannot be used either.
      new, metrics = jax.tree.map(lambda x: x + np.nan, new), {"loss": Late()}
    return jax.tree.map(jnp.asarray, new), metrics

  def lower(self, *args, model, settings):
    """A program of 4 MiB for every row of a micro-batch, 12 but for full."""
    del model
    rows = args[3].tokens.shape[1]
    found = python_types.SimpleNamespace(
        argument_size_in_bytes=rows << 22, output_size_in_bytes=50,
        temp_size_in_bytes=(settings.remat != "full") * rows << 23,
        alias_size_in_bytes=50, host_argument_size_in_bytes=0)
    done = python_types.SimpleNamespace(memory_analysis=lambda: found)
    return python_types.SimpleNamespace(compile=lambda: done)


def evaluate(params, base):
  del base
  mean = float(np.mean(jax.tree.leaves(jax.tree.map(jnp.mean, params))))
  return python_types.SimpleNamespace(
      loss=mean, perplexity=mean, nll=np.full(1, mean), weight=np.ones(1))


@pytest.fixture
def device(monkeypatch):
  """Makes a `Device` the one that trains."""

  def make(*fail, late=False):
    made = Device(*fail, late=late)
    monkeypatch.setattr(step_lib, "train_step", made)
    return made

  return make


# Two runs each: those that are not slow have every kind, told late or not.
@pytest.mark.parametrize("fail, every, back, late", [
    pytest.param(*place, late, marks=() if late == (n % 2 == 1) else
                 pytest.mark.slow) for n, place in enumerate([
        (0, 0, 0),  # The first step.
        (3, 0, 0),  # Nothing was saved since the start.
        (3, 2, 2),
        (4, 2, 4),  # Just after a checkpoint; all that is pending failed.
        (5, 2, 4),  # The last.
    ]) for late in (False, True)])
def test_nothing_is_lost(fail, every, back, late, device, tmp_path, capsys):
  plain = device()
  expected = fit(tmp_path / "plain", every, evaluate=evaluate)
  assert plain.calls == [("named", (1, B, T))] * STEPS
  capsys.readouterr()
  broken = device(fail, late=late)
  found = fit(tmp_path / "run", every, evaluate=evaluate)

  # A late failure is noticed one step later, but not where the run stops.
  tries = fail + 1 + (late and fail + 1 < STEPS
                      and not (every and (fail + 1) % every == 0))
  assert broken.calls == ([("named", (1, B, T))] * tries
                          + [("full", (1, B, T))] * (STEPS - back))
  assert capsys.readouterr().out.count(
      "memory: the device ran out of it with remat=named; going on from step "
      f"{back} with remat=full") == 1
  assert lines(tmp_path / "run") == lines(tmp_path / "plain")
  for got, want in zip(jax.tree.leaves(found.state),
                       jax.tree.leaves(expected.state), strict=True):
    np.testing.assert_array_equal(got, want)
  got, want = (dataclasses.replace(x.progress, seconds=0.0)
               for x in (found, expected))
  assert got == want
  assert ({p.name for p in (tmp_path / "run/checkpoints").iterdir()}
          == {p.name for p in (tmp_path / "plain/checkpoints").iterdir()})
  assert found.plan.choice == memory.Choice("full")


def test_a_batch_is_cut_where_remat_is_set(device, tmp_path):
  broken = device(1)
  fit(tmp_path / "run", settings=step_lib.Settings(remat="full"))
  assert broken.calls == [("full", (1, 4, T))] * 2 + [
      ("full", (2, 2, T))] * STEPS


FAILURES = {
    "the second time": (dict(), (0, 3)),
    "nothing is smaller": (dict(
        settings=step_lib.Settings(remat="full"),
        memory=memory.MemoryConfig(micro_batch=1, mlp_tiles=1)), (0,)),
}


@pytest.mark.parametrize("case", FAILURES)
def test_then_it_is_the_users_turn(case, device, tmp_path):
  changes, fail = FAILURES[case]
  device(*fail)
  with pytest.raises(errors.UserError) as caught:
    fit(tmp_path / "run", **changes)
  text = str(caught.value)
  assert text.startswith("the device ran out of memory with remat=full")
  assert f"({EXHAUSTED})" in text
  assert "set memory.auto=True" in text and "train.batch_size" in text
  assert "\n" not in text


def test_a_large_state_is_not_copied(device, tmp_path, monkeypatch):
  monkeypatch.setitem(program.COPIED, "cpu", 1000)
  device(0)
  with pytest.raises(errors.UserError, match="ran out of memory"):
    fit(tmp_path / "run")


def test_copies_are_made_in_long_stretches_too(device, tmp_path, monkeypatch):
  monkeypatch.setattr(program, "EVERY", 0.0)
  broken = device(4)
  fit(tmp_path / "run")
  assert len(broken.calls) == STEPS + 1  # Only what failed is done again.


def test_in_an_evaluation_it_is_no_step_that_failed(device, tmp_path):
  calls = device().calls

  def exhausted(params, base):
    raise jax.errors.JaxRuntimeError(EXHAUSTED)

  with pytest.raises(errors.UserError, match="ran out of memory"):
    fit(tmp_path / "run", evaluate=exhausted)
  assert not calls


def test_other_errors_are_not_taken_for_it(device, tmp_path, monkeypatch):
  def broken(*args, **options):
    raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")

  monkeypatch.setattr(step_lib, "train_step", broken)
  with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
    fit(tmp_path / "run")


def test_what_xla_says():
  """More than any address space holds."""
  with pytest.raises(jax.errors.JaxRuntimeError) as caught:
    jax.block_until_ready(
        jax.jit(lambda: jnp.zeros(2**56, jnp.uint8))())
  assert program.out_of_memory(caught.value)
