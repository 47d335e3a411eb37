"""Training, resuming and answering with a base and states in host memory."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax import host as host_lib
from lora_jax import trees
from lora_jax.evaluate import generate
from lora_jax.evaluate import perplexity
from lora_jax.export import hf as hf_export
from lora_jax.models import hf
from lora_jax.train import checkpoint
from lora_jax.train import optim
from lora_jax.train import step
from tests import tiny
from tests.adapters import contract

EVERY = tuple(host_lib.KINDS)


def start(offload, method="dora"):
  base, tree = contract.randomised(method, "nf4")
  params, frozen = adapters_lib.split(tree)
  if "base" in offload:
    base = host_lib.placed(base)
  return step.init_state(params, offload=offload), frozen, base


def train(state, frozen, base, offload):
  return step.train_step(
      state, frozen, base, contract.stacked(contract.batch()),
      optim.hyper(optim.OptimConfig(eps=1e-3), 1e-2), jax.random.key(0),
      model=contract.CONFIG,
      settings=step.Settings(remat="full", offload=offload))


def moments(state):
  return [x for x in jax.tree.leaves(state.opt_state) if x.ndim]


@pytest.fixture(scope="module")
def runs():
  """Two steps each: (losses, last state), and the state between the two."""
  found = {}
  for offload in ((), EVERY):
    state, frozen, base = start(offload)
    first, one = train(state, frozen, base, offload)
    middle = jax.tree.map(np.array, first)
    kinds = {x.sharding.memory_kind for s in (state, first)
             for x in moments(s)}
    gone = [x.is_deleted() for x in moments(state)]
    last, two = train(first, frozen, base, offload)
    found[offload] = ([float(m["loss"]) for m in (one, two)], last, middle,
                      kinds, gone)
  return found


def test_two_steps_are_those_of_a_resident_run(runs):
  losses, last, *_ = runs[EVERY]
  wanted, theirs, *_ = runs[()]
  np.testing.assert_allclose(losses, wanted, rtol=1e-6)
  assert losses[1] < losses[0]
  theirs = trees.paths((theirs.params, theirs.opt_state))
  for path, x in trees.paths((last.params, last.opt_state)).items():
    np.testing.assert_allclose(
        x, theirs[path], rtol=1e-5, atol=1e-6, err_msg=path)


def test_moments_are_in_host_memory_between_steps(runs):
  *_, kinds, gone = runs[EVERY]
  assert kinds == {"pinned_host"}
  assert all(gone)  # Donated: there are never two of them.
  *_, kinds, gone = runs[()]
  assert kinds == {"device"} and all(gone)


@pytest.mark.parametrize("offload", [(), EVERY])
def test_a_checkpoint_goes_on_with_other_memory(runs, offload, tmp_path):
  """Saved by an offloaded run, read by either."""
  _, last, middle, _, _ = runs[EVERY]
  away, *_ = start(EVERY)
  like = jax.tree.map(
      lambda x, y: jax.device_put(x, y.sharding), middle, away)
  files = checkpoint.Checkpoints(tmp_path)
  files.save(1, like, {})
  fresh, frozen, base = start(offload)
  state, _ = files.restore(fresh)
  files.close()
  kind = "pinned_host" if offload else "device"
  assert {x.sharding.memory_kind for x in moments(state)} == {kind}
  for ours, theirs in zip(*map(jax.tree.leaves, (state, middle)), strict=True):
    np.testing.assert_array_equal(ours, theirs)
  if offload:
    state, _ = train(state, frozen, base, offload)
    for ours, theirs in zip(*map(jax.tree.leaves, (state, last)), strict=True):
      np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow  # As training, the same pass.
def test_generation_reads_the_base_where_it_is():
  base, tree = contract.randomised("dora", "nf4")
  ours, theirs = (
      generate.generate(contract.CONFIG, where, tree, [[1, 2, 3], [4]],
                        max_new_tokens=4)
      for where in (host_lib.placed(base), base))
  assert ours == theirs


@pytest.mark.slow  # As generation, the same pass over the layers.
def test_evaluation_reads_the_base_where_it_is():
  base, tree = contract.randomised("dora", "nf4")
  ours, theirs = (
      perplexity.row_losses(tree, where, [(contract.batch(), np.arange(2))],
                            model=contract.CONFIG).nll
      for where in (host_lib.placed(base), base))
  np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@pytest.mark.slow  # A program for each tensor.
def test_what_is_written_is_the_same():
  base, tree = contract.randomised("dora", "nf4")
  for write in (
      lambda b: hf_export.merged(contract.CONFIG, b, tree)[1],
      lambda b: hf.state(contract.CONFIG, b, np.float32)):
    for (name, ours), (_, theirs) in zip(
        write(host_lib.placed(base)), write(base), strict=True):
      np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6,
                                 err_msg=name)


def test_adapters_start_from_a_base_in_host_memory():
  base, _ = contract.built("dora", "nf4")
  config = dataclasses.replace(
      contract.block("dora"), targets="q_proj,down_proj", rank_pattern={})
  paths = tiny.paths(contract.CONFIG)
  _, ours = adapters_lib.build(
      jax.random.key(1), config, host_lib.placed(base), paths)
  _, theirs = adapters_lib.build(jax.random.key(1), config, base, paths)
  theirs = trees.paths(theirs)
  for path, x in trees.paths(ours).items():
    np.testing.assert_allclose(x, theirs[path], rtol=1e-6, err_msg=path)
    assert not host_lib.in_host(x)


@pytest.mark.parametrize("fields", [
    {"method": "full"}, {"method": "lora", "init": "loftq",
                         "targets": "q_proj"}])
def test_weights_that_change_cannot_be_away(fields):
  config = dataclasses.replace(
      contract.block(fields["method"]), rank_pattern={}, **fields)
  with pytest.raises(errors.UsageError, match=r"compute\.offload"):
    adapters_lib.build(
        jax.random.key(1), config, host_lib.placed(contract.quantised("nf4")),
        tiny.paths(contract.CONFIG), lambda *_: None)
