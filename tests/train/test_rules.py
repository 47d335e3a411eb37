"""What a method adds to training: its penalty, its part of the optimiser."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import api
from lora_jax import errors
from lora_jax import trees
from lora_jax.adapters import method
from lora_jax.adapters import registry
from lora_jax.data import dataset
from lora_jax.data import templates
from lora_jax.train import checkpoint
from lora_jax.train import loop
from lora_jax.train import optim
from lora_jax.train import precision
from lora_jax.train import step
from tests import devices
from tests.adapters import contract

KEY, T = jax.random.key(0), 5
HYPER = optim.hyper(optim.OptimConfig(clip_norm=0.01, eps=1e-3), 1e-2)


class Seen(NamedTuple):
  grads: object
  inner: object


@dataclasses.dataclass(frozen=True)
class Watch(method.Rule):
  """w |params|^2, and a note of the gradients that the optimiser is given."""

  weight: float

  def penalty(self, params):
    return self.weight * sum(
        jnp.sum(jnp.square(p)) for p in jax.tree.leaves(params))

  def wrap(self, inner):
    def init(params):
      return Seen(jax.tree.map(jnp.zeros_like, params), inner.init(params))

    def update(updates, state, params, *, frozen, **extra):
      assert frozen.layers["q_proj"].scale is not None
      seen = updates
      updates, held = inner.update(updates, state.inner, params, **extra)
      return updates, Seen(seen, held)

    return optax.GradientTransformationExtraArgs(init, update)


def run(state, frozen, base, batch, **settings):
  return step.train_step(
      state, frozen, base, contract.stacked(batch), HYPER, KEY,
      model=contract.CONFIG, settings=step.Settings(**settings))


def spoiled():
  """A batch whose loss is not finite."""
  batch = contract.batch()
  weights = np.array(batch.loss_weights)
  weights[0, 0] = np.inf
  return dataclasses.replace(batch, loss_weights=weights)


def host(tree):
  return jax.tree.map(np.array, tree)


def test_the_penalty_is_in_the_gradient_and_not_in_the_loss():
  base, tree = contract.randomised("lora", "none")
  params, frozen = adapters_lib.split(tree)
  rules = (Watch(0.25),)
  _, plain = run(step.init_state(params), frozen, base, contract.batch())
  assert "penalty" not in plain
  state, metrics = run(step.init_state(params, rules=rules), frozen, base,
                       contract.batch(), rules=rules)
  assert metrics["loss"] == plain["loss"]
  square = sum(float((np.asarray(p)**2).sum())
               for p in jax.tree.leaves(params))
  assert metrics["penalty"] == pytest.approx(0.25 * square, rel=1e-5)
  _, grads = contract.gradient(
      params, frozen, base, contract.stacked(contract.batch()), KEY)
  # w |p|^2 has the gradient 2 w p; clipping is of the sum.
  whole = jax.tree.map(lambda g, p: np.asarray(g + 0.5 * p), grads, params)
  norm = np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(whole)))
  assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
  seen = trees.paths(state.opt_state[1].grads)
  for path, x in trees.paths(whole).items():
    np.testing.assert_allclose(
        seen[path], 0.01 * x / norm, rtol=1e-4, atol=1e-8, err_msg=path)
  before = host(state)
  state, metrics = run(state, frozen, base, spoiled(), rules=rules)
  assert not metrics["finite"] and state.step == 2
  for new, old in zip(jax.tree.leaves((state.params, state.opt_state)),
                      jax.tree.leaves((before.params, before.opt_state))):
    np.testing.assert_array_equal(new, old)


@functools.cache
def adalora():
  """(base, params, frozen, rules): ranks 4 on average 2 from step 4 on."""
  config = contract.block("adalora", targets="q_proj,up_proj", layers="0,2",
                          options={"target_r": 2, "tfinal": 1})
  base, tree = adapters_lib.build(
      jax.random.key(1), config, contract.quantised("none"),
      contract.tiny.paths(contract.CONFIG), geometry=contract.GEOMETRY)
  rules = registry.rules(config, T, tree)
  return base, *adapters_lib.split(tree), rules


def left(params):
  return sum(int((np.asarray(a.e, np.float32) != 0).sum())
             for a in params.layers.values())


# Six steps compiled; the others of this file have one.
@pytest.mark.slow
def test_adalora_in_every_number_format_and_over_a_restart(tmp_path):
  """float16, states in bfloat16 and 8 bits, in host memory: one program."""
  base, params, frozen, rules = adalora()
  stored = precision.Precision(
      adapter_dtype="bfloat16", optim_dtype="bfloat16", loss_scale=2.0**10)

  def fresh():
    return step.init_state(
        params, stored, "float16", "adamw8bit", ("optimiser",), rules)

  def forward(state, batch=None):
    return run(
        state, frozen, base, batch or contract.batch(), dtype="float16",
        optim_dtype="bfloat16", optimizer="adamw8bit", rules=rules,
        offload=("optimiser",))

  state, kept = fresh(), []
  kinds = {x.sharding.memory_kind for x in jax.tree.leaves(
      state.opt_state[1].importance)}
  assert kinds == {"pinned_host"}
  for number in range(T):
    state, metrics = forward(state)
    assert metrics["finite"] and metrics["penalty"] > 0
    kept.append(left(state.params))
    if number == 1:
      saved = checkpoint.Checkpoints(tmp_path / "c")
      saved.save(2, host(state), {})
      before = host(state)
      # A step that is skipped: the scale halves, and nothing else changes.
      state, metrics = forward(state, spoiled())
      assert state.loss_scale.scale == 2.0**9
      for new, old in zip(jax.tree.leaves((state.params, state.opt_state)),
                          jax.tree.leaves((before.params, before.opt_state))):
        np.testing.assert_array_equal(new, old)
      state = state.replace(
          step=before.step, loss_scale=before.loss_scale)
  # Four matrices: b(t) = floor(8 (1 - t/4)^3 + 8).
  assert kept == [11, 9, 8, 8, 8]
  again, _ = saved.restore(fresh())
  saved.close()
  for _ in range(T - 2):
    again, _ = forward(again)
  for new, old in zip(jax.tree.leaves(again), jax.tree.leaves(state)):
    np.testing.assert_array_equal(new, old)


def test_a_run_logs_the_penalty_and_ends_pruned(tmp_path):
  model = api.Model(
      config=contract.CONFIG, base=contract.quantised("none"), tokenizer=None,
      fingerprint="0" * 64, source="tiny").adapt(
          method="adalora", rank=4, targets="q_proj", options={"target_r": 2})
  rows = dataset.of([templates.Encoded(
      tokens=np.arange(9, dtype=np.int32), weights=np.ones(9, np.float32))])
  trained, _ = model.train(rows, workdir=tmp_path, config=loop.TrainConfig(
      steps=2, batch_size=1))
  assert left(trained.adapters) == 6
  lines = [json.loads(line) for line in
           (tmp_path / "metrics.jsonl").read_text().splitlines()]
  params, _ = adapters_lib.split(model.adapters)
  assert lines[0]["penalty"] == pytest.approx(float(
      registry.rules(model.adapter_config, 2, model.adapters)[0].penalty(
          params)), rel=1e-5)
  late = model.adapt(method="adalora", rank=8, options={"tinit": 9})
  with pytest.raises(errors.UsageError, match="leave none of"):
    late.train(rows, workdir=tmp_path / "b", config=loop.TrainConfig(steps=9))


# A process of eight devices; test_contract_sharded.py has AdaLoRA's step.
@pytest.mark.slow
def test_adalora_on_eight_devices_prunes_what_it_does_on_one():
  done = subprocess.run(
      [sys.executable, "-m", "tests.train.rules_sharded"],
      cwd=pathlib.Path(__file__).parents[2], capture_output=True, text=True,
      timeout=600, env=devices.environ(8))
  assert done.returncode == 0, done.stderr[-3000:]
  found = json.loads(done.stdout.splitlines()[-1])
  assert found["kept"] == found["expected"]
  assert 0 < sum(map(sum, found["kept"])) < 48
  assert found["worst"] < 2e-4
  # I of A `[l, i, r]` is cut as A is.
  assert found["spec"] == ["None", "fsdp", "None"]
