"""Members compute what each of them would alone, and end each for itself."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import api
from lora_jax import errors
from lora_jax.api import training
from lora_jax.data import dataset
from lora_jax.data import templates
from lora_jax.train import loop
from lora_jax.train import members
from lora_jax.train import optim as optim_lib
from tests.adapters import contract

STEPS = 50


@functools.cache
def model():
  return api.Model(
      config=contract.CONFIG, base=contract.quantised("nf4"), tokenizer=None,
      fingerprint="0" * 64, source="tiny")


def rows(number, seed):
  rng = np.random.default_rng(seed)
  return dataset.of([templates.Encoded(
      tokens=rng.integers(0, 31, n).astype(np.int32),
      weights=np.ones(n, np.float32))
      for n in rng.integers(6, 15, number)])


ROWS, HELD = rows(40, 0), rows(6, 1)
# What differs: data order, ranks, scales, rates, clipping, decay, dropout,
# schedules, lengths, and what has no padding.
RUNS = {
    "plain": dict(rank=4),
    "rank": dict(rank=7, alpha=9.0),
    "optim": dict(rank=4, optim=dict(
        learning_rate=3e-3, clip_norm=0.05, weight_decay=0.1,
        schedule="linear", lora_plus_ratio=4.0)),
    "seed": dict(rank=4, seed=5, dropout=0.3),
    "short": dict(rank=5, steps=20),
}


def prepared(folder, name, **changes):
  given = dict(method="lora", targets="q_proj,up_proj") | RUNS[name] | changes
  optim = optim_lib.OptimConfig(**dict(
      learning_rate=1e-3) | given.pop("optim", {}))
  seed, steps = given.pop("seed", 0), given.pop("steps", STEPS)
  every, patience = given.pop("every", 0), given.pop("patience", 0)
  data = given.pop("rows", ROWS)
  return training.prepare(
      model().adapt(seed=seed, **given), data, HELD, workdir=folder / name,
      config=loop.TrainConfig(
          steps=steps, batch_size=2, eval_every=every or 20, patience=patience,
          checkpoint_every=every),
      optim=optim, max_length=16, seed=seed)


def lines(folder, key="loss"):
  text = (folder / "metrics.jsonl").read_text().splitlines()
  return np.array([v[key] for v in map(json.loads, text) if key in v])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  folder = tmp_path_factory.mktemp("alone")
  return folder, {name: prepared(folder, name).fit() for name in RUNS}


def test_each_is_as_it_would_be_alone(alone, tmp_path):
  folder, expected = alone
  runs = [prepared(tmp_path, name) for name in RUNS]
  assert members.groups([one.run for one in runs]) == [[0, 2, 3, 4, 1]]
  found = training.fit(runs, note=lambda line: None)
  for name, (there, outcome) in zip(RUNS, found, strict=True):
    here, wanted = expected[name]
    assert outcome.progress.step == wanted.progress.step
    assert outcome.progress.tokens == wanted.progress.tokens
    for key in ("loss", "eval_loss", "grad_norm"):
      a, b = lines(tmp_path / name, key), lines(folder / name, key)
      assert a.shape == b.shape
      tolerance = 1e-3 if key == "grad_norm" else 1e-5
      np.testing.assert_allclose(a, b, rtol=tolerance)
    np.testing.assert_array_equal(
        lines(tmp_path / name, "lr"), lines(folder / name, "lr"))
    for a, b in zip(jax.tree.leaves(there.adapters),
                    jax.tree.leaves(here.adapters), strict=True):
      assert a.shape == b.shape
      if not jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
        np.testing.assert_allclose(a, b, atol=2e-3)
  # And they do differ from one another.
  ends = {round(o.progress.best_loss, 5) for _, o in found}
  assert len(ends) == len(RUNS)


def test_one_stops_early_and_one_fails_and_the_others_go_on(alone, tmp_path):
  folder, _ = alone
  stops = prepared(tmp_path, "seed", every=2, patience=1, optim=dict(
      learning_rate=5.0))
  fails = prepared(tmp_path, "optim", optim=dict(learning_rate=1e-2))
  bad = dataclasses.replace(fails.run.state, params=jax.tree.map(
      lambda x: x.at[...].set(np.nan), fails.run.state.params))
  fails = dataclasses.replace(fails, run=dataclasses.replace(
      fails.run, state=bad, task=dataclasses.replace(
          fails.run.task, evaluate=None)))
  notes = []
  good, stopped, failed = training.fit(
      [prepared(tmp_path, "plain"), stops, fails], notes.append)
  np.testing.assert_allclose(
      lines(tmp_path / "plain"), lines(folder / "plain"), rtol=1e-5)
  assert good[1].progress.step == STEPS
  assert stopped[1].stopped_early and stopped[1].progress.step < STEPS
  assert isinstance(failed, errors.UserError)
  assert (tmp_path / "optim/nonfinite.json").exists()
  assert any(n.startswith("[2] error: step 1: loss=nan") for n in notes)


def test_what_was_killed_goes_on_each_from_its_own_checkpoint(
    alone, tmp_path, monkeypatch):
  folder, _ = alone
  names = ["plain", "rank"]
  again = lambda: [prepared(tmp_path, n, every=e)
                   for n, e in zip(names, (10, 20), strict=True)]
  real, calls = members._train_steps, []

  def dying(*args, **kwargs):
    calls.append(1)
    if len(calls) == 37:
      raise KeyboardInterrupt
    return real(*args, **kwargs)

  monkeypatch.setattr(members, "_train_steps", dying)
  with pytest.raises(KeyboardInterrupt):
    training.fit(again(), note=lambda line: None)
  calls.clear()
  monkeypatch.setattr(members, "_train_steps", real)
  found = training.fit(again(), note=lambda line: None)
  for name, (_, outcome) in zip(names, found, strict=True):
    assert outcome.progress.step == STEPS
    a, b = lines(tmp_path / name), lines(folder / name)
    np.testing.assert_allclose(a, b, rtol=1e-5)


def test_what_cannot_train_together_does_not(tmp_path):
  def of(**changes):
    return prepared(tmp_path, "plain", **changes).run

  def kinds(*runs):
    return len({members.kind(run) for run in runs})

  one = of()
  assert kinds(one, of(rank=8), of(alpha=3.0), of(dropout=0.5),
               of(optim=dict(learning_rate=1.0, clip_norm=0.0))) == 1
  others = [
      of(method="dora"), of(targets="q_proj"), of(method="vera"),
      of(method="vera", rank=8), of(optim=dict(name="adamw8bit")),
      of(optim=dict(name="adamw8bit"), rank=8)]
  assert kinds(one, *others) == 7
  # Ranks that would be padded too far, and too many at once.
  ranks = [of(rank=r) for r in (2, 4, 5, 8, 64)]
  assert members.groups(ranks) == [[0, 1], [2, 3], [4]]
  assert members.groups([one] * 5, most=2) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("method", [
    name if name in ("lora", "dora") else pytest.param(
        name, marks=pytest.mark.slow)  # Each compiles two models' gradients.
    for name, row in adapters_lib.METHODS.items()
    if row.adapter is not None and row.adapter.pads])
def test_zeros_behind_the_ranks_do_nothing(method):
  """Of every method that says so: the same loss, and gradients 0 there."""
  _, tree = contract.built(method, "nf4")
  tree = contract.moved(tree)
  params, frozen = adapters_lib.split(tree)
  wide = {}
  for rank in (4, 6):
    _, wide[rank] = adapters_lib.build(
        jax.random.key(1), contract.block(method, rank=rank, rank_pattern={}),
        contract.quantised("nf4"), contract.tiny.paths(contract.CONFIG),
        geometry=contract.GEOMETRY)
  small = contract.moved(wide[4])
  params, frozen = adapters_lib.split(small)
  like, _ = adapters_lib.split(wide[6])

  def fill(x, y):
    return x if x.shape == y.shape else np.pad(x, [
        (0, b - a) for a, b in zip(x.shape, y.shape, strict=True)])

  padded = jax.tree.map(fill, params, like)
  still = jax.tree.map(fill, frozen, adapters_lib.split(wide[6])[1])
  data = contract.stacked(contract.batch_of(tree))
  run = functools.partial(
      contract.gradient, base=contract.quantised("nf4"), data=data,
      key=jax.random.key(0))
  value, grads = run(params, frozen)
  again, others = run(padded, still)
  np.testing.assert_allclose(again, value, rtol=1e-6)
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(others),
                  strict=True):
    np.testing.assert_allclose(fill(a, b), b, atol=1e-6)
