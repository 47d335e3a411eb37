"""Layers in several runs compute what one padded stack does, and less."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import host as host_lib
from lora_jax import quant
from lora_jax import trees
from lora_jax.adapters import assemble
from lora_jax.adapters import partition
from lora_jax.adapters import runs
from lora_jax.evaluate import generate
from lora_jax.models import decoder
from lora_jax.models import init
from lora_jax.models import modules
from lora_jax.train import checkpoint
from lora_jax.train import step as step_lib
from tests import tiny
from tests.adapters import contract

L = 6
CONFIG = dataclasses.replace(
    contract.CONFIG, n_layers=L, sliding_window=4,
    window_layers=(True, False, False, True, True, False))
# Layers 0 and 1 are not adapted; 5 has much the larger rank. A and B are like
# no weight and no codes.
BLOCK = adapters_lib.AdapterConfig(
    rank=3, alpha=4.0, targets="q_proj,down_proj", layers="2-5",
    rank_pattern={r"layers\.5\..*": 20})
ENDS = (2, 5, L)
KEY = jax.random.key(5)


@functools.cache
def base(fmt="nf4"):
  if fmt == "none":
    return init.random_base(jax.random.key(0), CONFIG)
  return init.quantised_base(
      jax.random.key(0), CONFIG, quant.QuantSpec(fmt, block_size=32))


@functools.cache
def adapters(method="lora"):
  tree = tiny.random_adapters(
      CONFIG, base(), dataclasses.replace(BLOCK, method=method), scale=0.1)
  return adapters_lib.beside(tree, base())


def padded(tree):
  """The same adapters as one stack a target, padded with zeros."""

  def one(target, stacked):
    modules = [partition.module(tree, target, i) for i in range(L)]
    like = max((m for m in modules if m is not None),
               key=lambda m: m.a.shape[1])
    width = like.a.shape[1]
    modules = [like.inert() if m is None else m.replace(
        a=jnp.pad(m.a, ((0, 0), (0, width - m.a.shape[1]))),
        b=jnp.pad(m.b, ((0, width - m.b.shape[0]), (0, 0)))) for m in modules]
    assert isinstance(stacked, runs.Runs)
    return jax.tree.map(lambda *x: jnp.stack(x), *modules)

  return tree.replace(layers={k: one(k, v) for k, v in tree.layers.items()})


PLANS = {
    "equal": ([8] * 6, (6,)),
    "within twice": ([4, 4, 8, 8], (4,)),
    "twice as much": ([1, 1, 1, 1, 8, 8], (4, 6)),
    "in the middle": ([4] * 13 + [256] * 4 + [4] * 13, (13, 17, 30)),
    "a start": ([0, 0, 4, 4, 4, 4], (2, 6)),
    "a short start": ([0, 4, 4, 4, 4, 4], (6,)),
    "an end": ([4, 4, 0, 0], (2, 4)),
    "both": ([0, 0, 4, 4, 0, 0], (2, 4, 6)),
    # Five would be exact: 2 + 128 + 6 + 192 with the last two as one.
    "at most four": (
        [1, 1, 64, 64, 1, 1, 1, 1, 1, 1, 64, 64, 1], (2, 4, 10, 13)),
    # Four would be 390: not worth another program.
    "few enough": ([1, 2, 64, 64, 1, 1, 64, 64, 1, 2], (2, 8, 10)),
    "a start, and ranks": ([0, 0, 2, 2, 2, 24], (2, 5, 6)),
    "nothing": ([0, 0], (2,)),
}


@pytest.mark.parametrize("case", PLANS)
def test_where_layers_are_cut(case):
  ranks, expected = PLANS[case]
  assert runs.plan({"q_proj": ranks}, {"q_proj": 10}) == expected


def test_targets_are_cut_at_the_same_places_by_what_they_cost():
  small, large = [8, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 8]
  ranks = {"q_proj": small, "down_proj": large}
  assert runs.plan(ranks, {"q_proj": 1, "down_proj": 1000}) == (5, 6)
  assert runs.plan(ranks, {"q_proj": 1000, "down_proj": 1}) == (1, 6)


@pytest.mark.parametrize("seed", range(5))
def test_no_other_cut_is_smaller(seed):
  """Against all cuts of 7 layers into at most four runs."""
  import itertools

  rng = np.random.default_rng(seed)
  ranks = {"a": rng.choice([1, 2, 64], 7), "b": rng.choice([1, 32], 7)}
  weights = {"a": 3, "b": 5}

  def size(ends):
    return sum((stop - start) * sum(
        weights[n] * ranks[n][start:stop].max() for n in ranks)
               for start, stop in runs.spans(ends))

  sizes = {n: min(size((*cut, 7)) for cut in itertools.combinations(
      range(1, 7), n - 1)) for n in range(1, 5)}
  found = runs.plan(ranks, weights)
  assert size(found) == sizes[len(found)]
  if len(found) > 1:
    assert size(found) <= runs.NEAR * sizes[4]
    assert all(sizes[n] > runs.NEAR * sizes[4] for n in range(1, len(found)))


def test_the_tree_says_what_is_where():
  tree = adapters()
  for name, stacked in tree.layers.items():
    assert stacked.ends == ENDS and stacked.stacks[0] is None
    assert [s.a.shape[0] for s in stacked.stacks[1:]] == [3, 1]
    assert [s.a.shape[2] for s in stacked.stacks[1:]] == [3, 20]
    assert partition.module(tree, name, 1) is None
    assert int(partition.module(tree, name, 5).rank) == 20
  i, o = tiny.shapes(CONFIG)["q_proj"]
  both = i + o + sum(tiny.shapes(CONFIG)["down_proj"])
  assert adapters_lib.trainable_size(tree) == (3 * 3 + 20) * both
  trainable, frozen = adapters_lib.split(tree)
  assert trees.size(trainable) == (3 * 3 + 20) * both  # Nothing is padding.
  assert jax.tree.structure(
      adapters_lib.join(trainable, frozen)) == jax.tree.structure(tree)
  placed = assemble.place(BLOCK, modules.paths(CONFIG))
  for name, found in assemble.placements(tree).items():
    np.testing.assert_array_equal(found.rank, placed[name].rank)
    np.testing.assert_array_equal(found.scale, placed[name].scale)
  assert all(jax.tree.leaves(trees.stacked(trainable)))


@functools.partial(jax.jit, static_argnames="settings")
def gradient(trained, frozen, base, settings):
  data = contract.stacked(contract.batch())
  return step_lib.loss_and_grads(
      trained, frozen, base, data, KEY, model=CONFIG, settings=settings)


@functools.cache
def one_stack(method, fmt):
  """Loss and, by module, gradients of the padded tree."""
  tree = adapters_lib.with_rate(padded(adapters(method)), 0.3)
  value, grads = gradient(*adapters_lib.split(tree), base(fmt),
                          step_lib.Settings(remat="full", noise=True))
  return value, grads


def equal_gradients(method, fmt, remat, host=False, offload=()):
  tree = adapters_lib.with_rate(adapters(method), 0.3)
  expected, whole = one_stack(method, fmt)
  weights = host_lib.placed(base(fmt)) if host else base(fmt)
  value, grads = gradient(
      *adapters_lib.split(tree), weights,
      step_lib.Settings(remat=remat, noise=True, offload=offload))
  assert abs(value - expected) <= 2e-6 * abs(expected)
  for name, stacked in grads.layers.items():
    for stack, start, stop in runs.each(stacked):
      for field in ("a", "b"):
        ours, theirs = (getattr(x, field) for x in (
            stack, runs.part(whole.layers[name], start, stop)))
        theirs = theirs[tuple(map(slice, ours.shape))]
        scale = np.abs(theirs).max()
        assert scale > 0 and np.abs(ours - theirs).max() < 2e-5 * scale


# Two programs each; `test_same_in_every_case` has all of LoRA's.
@pytest.mark.parametrize("method, fmt, remat, host, offload", [
    ("lora", "none", "none", False, ()),
    pytest.param("lora", "nf4", "full", True, ("activations",),
                 marks=pytest.mark.slow),
    pytest.param("dora", "nf4", "named", True, (), marks=pytest.mark.slow),
])
def test_same_loss_and_gradients_as_one_stack(
    method, fmt, remat, host, offload):
  equal_gradients(method, fmt, remat, host, offload)


@pytest.mark.slow  # 24 programs: minutes.
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("offload", [(), ("activations",)])
@pytest.mark.parametrize("host", [False, True])
@pytest.mark.parametrize("remat", ["none", "dots", "named", "full"])
@pytest.mark.parametrize("fmt", ["none", "nf4"])
def test_same_in_every_case(fmt, remat, host, offload):
  equal_gradients("lora", fmt, remat, host, offload)


def traced(fmt, remat, host=False, offload=()):
  trained, frozen = adapters_lib.split(adapters())
  weights = host_lib.placed(base(fmt)) if host else base(fmt)
  return gradient.trace(
      trained, frozen, weights,
      step_lib.Settings(remat=remat, noise=True, offload=offload))


def scans(jaxpr):
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "scan":
      yield eqn
    for value in jax.tree.leaves(
        list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        yield from scans(inner)


@pytest.mark.parametrize("fmt", ["none", "nf4"])
@pytest.mark.parametrize("host, offload", [
    (False, ()), (True, ()), (False, ("activations",))])
@pytest.mark.parametrize("remat", [
    "named", *(pytest.param(x, marks=pytest.mark.slow)  # A second each.
               for x in ("none", "dots", "full"))])
def test_no_weight_is_kept_between_the_passes(fmt, remat, host, offload):
  """Nor is a part of a stack: no scan gives or takes several layers of it."""
  shapes = {x.shape[1:] for x in jax.tree.leaves(base(fmt).layers)
            if len(x.shape) > 2}
  # The third run is one layer, whose parts look like other things.
  depths = {stop - start for start, stop in runs.spans(ENDS)[:2]}
  held = {(n, *shape) for n in depths for shape in shapes}
  found = {var.aval.shape for eqn in scans(traced(
      fmt, remat, host, offload).jaxpr.jaxpr)
           for var in (*eqn.invars, *eqn.outvars)}
  kept = found & held
  assert not kept
  whole = {(L, *shape) for shape in shapes}
  assert found & whole  # They are read out of the whole stacks.


def test_a_compiled_step_has_no_part_of_the_base():
  text = traced("nf4", "named").lower().compile().as_text()
  codes = {x.shape[1:] for x in jax.tree.leaves(base().layers)
           if x.dtype == jnp.uint8 and len(x.shape) > 2}
  found = {tuple(map(int, shape.split(","))) for shape in re.findall(
      r"u8\[([\d,]+)\]", text)}
  assert {(L, *shape) for shape in codes} <= found
  assert not {(n, *shape) for n in (2, 3) for shape in codes} & found


def test_layers_before_the_first_adapted_one_have_no_backward_pass():
  """One scan of two layers, forwards, and it keeps nothing."""
  lengths = [eqn.params["length"] for eqn in scans(
      traced("nf4", "named").jaxpr.jaxpr)]
  assert lengths.count(3) == 2
  first = [eqn for eqn in scans(traced("nf4", "named").jaxpr.jaxpr)
           if eqn.params["length"] == 2]
  b, t = contract.batch().tokens.shape
  assert len(first) == 1
  assert not [v for v in first[0].outvars if v.aval.shape[:1] == (2,)
              and v.aval.shape[1:3] == (b, t)]


def test_trained_modules_of_the_base_beside_runs():
  """Norms are overrides: their gradient goes through the cuts."""
  block = dataclasses.replace(BLOCK, modules_to_save=("input_layernorm",))
  tree = tiny.random_adapters(CONFIG, base(), block, scale=0.1)
  value, grads = gradient(
      *adapters_lib.split(tree), base(), step_lib.Settings(remat="named"))
  other, whole = gradient(
      *adapters_lib.split(padded(tree)), base(),
      step_lib.Settings(remat="named"))
  assert abs(value - other) <= 2e-6 * abs(other)
  ours, theirs = (g.overrides.layers["input_layernorm"] for g in (
      grads, whole))
  assert (np.abs(theirs).max(1) > 0).all()
  np.testing.assert_allclose(
      ours, theirs, rtol=1e-4, atol=1e-5 * float(np.abs(theirs).max()))


@pytest.mark.parametrize("method", [
    "lora", pytest.param("dora", marks=pytest.mark.slow)])
def test_generation_reads_the_cache_by_layer(method):
  """Greedy tokens are those that whole passes give, one after the other."""
  tree, prompt = adapters(method), [[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5]]
  found = generate.generate(CONFIG, base(), tree, prompt, max_new_tokens=5)
  for row, new in zip(prompt, found):
    tokens = np.asarray([row + new], np.int32)
    positions = np.arange(tokens.shape[1], dtype=np.int32)[None]
    logits = tiny.logits(
        CONFIG, base(), tokens, positions, np.ones_like(tokens), padded(tree))
    assert np.argmax(logits[0, len(row) - 1:-1], -1).tolist() == new
  assert found != generate.generate(
      CONFIG, base(), None, prompt, max_new_tokens=5)


def test_a_cache_is_not_cut_either():
  prompt = np.ones((1, 4), np.int32)
  cache = decoder.cache_lib.init_cache(CONFIG, 1, 16)
  step = jax.jit(lambda tree, cache: decoder.forward(
      CONFIG, base(), tree, prompt, prompt, prompt, cache=cache))
  jaxpr = step.trace(adapters(), cache).jaxpr.jaxpr
  shapes = {v.aval.shape for eqn in scans(jaxpr)
            for v in (*eqn.invars, *eqn.outvars)}
  assert cache.k.shape in shapes
  assert not {(n, *cache.k.shape[1:]) for n in (1, 2, 3)} & shapes


def test_checkpoints_hold_runs(tmp_path):
  params, _ = adapters_lib.split(adapters())
  state = step_lib.init_state(params)
  store = checkpoint.Checkpoints(tmp_path / "checkpoints")
  store.save(1, state, {"x": 1})
  back, meta = store.restore(jax.tree.map(jnp.zeros_like, state))
  store.close()
  assert meta == {"x": 1}
  assert jax.tree.structure(back) == jax.tree.structure(state)
  for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(state)):
    np.testing.assert_array_equal(a, b)


def test_starts_out_of_the_weights_are_those_of_one_stack(monkeypatch):
  """PiSSA takes out the same; the digest of it is the same."""
  block = dataclasses.replace(BLOCK, init="pissa")

  def made():
    return adapters_lib.build(
        jax.random.key(0), block, base("none"), modules.paths(CONFIG))

  after, tree = made()
  assert isinstance(tree.layers["q_proj"], runs.Runs)
  monkeypatch.setattr(runs, "MOST", 1)
  monkeypatch.setattr(runs, "IDLE", 2)
  whole_after, whole = made()
  assert not isinstance(whole.layers["q_proj"], runs.Runs)
  digests = {adapters_lib.starts.digest(a, adapters_lib.starts.taken(t))
             for a, t in ((after, tree), (whole_after, whole))}
  assert len(digests) == 1
  factors = adapters_lib.starts.taken(tree)
  again = adapters_lib.starts.attached(tree, factors)
  for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(tree)):
    np.testing.assert_array_equal(a, b)
