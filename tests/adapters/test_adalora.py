"""AdaLoRA's budget, pruning and penalty against PEFT's, and its real sizes."""

from __future__ import annotations

import dataclasses
import functools
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax.adapters import adalora
from lora_jax.adapters import allocation
from lora_jax.adapters import base as base_lib
from lora_jax.adapters import registry
from lora_jax.export import hf as hf_export
from lora_jax.export import peft as peft_export
from lora_jax.models import init
from lora_jax.models import modules
from tests import tiny
from tests.adapters import contract

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
RankAllocator = pytest.importorskip("peft.tuners.adalora.layer").RankAllocator

CONFIG = dataclasses.replace(contract.CONFIG, qkv_bias=False)
PATHS, STEPS, RATE = modules.paths(CONFIG), 14, 0.05
TOKENS = np.random.default_rng(0).integers(0, 31, (2, 12)).astype(np.int32)
BLOCK = adapters_lib.AdapterConfig(
    method="adalora", rank=4, alpha=8.0, targets="q_proj,down_proj",
    options={"target_r": 2, "tinit": 2, "tfinal": 3, "delta_t": 2})


@functools.cache
def base():
  return init.random_base(jax.random.key(0), CONFIG)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  where = tmp_path_factory.mktemp("base")
  hf_export.write(where / "m", CONFIG, base(), None)
  return where / "m"


def torch_model(folder):
  import transformers

  return transformers.AutoModelForCausalLM.from_pretrained(
      folder, dtype=torch.float32, attn_implementation="eager").eval()


def pretrained(folder, adapter, **options):
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    return peft.PeftModel.from_pretrained(
        torch_model(folder), str(adapter), **options)


def write(where, tree, block=BLOCK, **changes):
  config = peft_export.peft_config(block, tree, PATHS, "some/base") | changes
  peft_export.write(where, tree, config, PATHS)


def read(where):
  return peft_export.read(
      where, PATHS, modules.shapes(CONFIG), geometry=modules.geometry(CONFIG))


def our_logits(tree):
  return np.asarray(_logits(base(), tree))


@jax.jit
def _logits(weights, tree):
  positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)
  return tiny.logits(
      CONFIG, weights, TOKENS, positions, jnp.ones_like(positions), tree)


def peft_logits(model):
  with torch.no_grad():
    return model(torch.from_numpy(np.asarray(TOKENS, np.int64))).logits.numpy()


def built():
  _, tree = adapters_lib.build(
      jax.random.key(1), BLOCK, base(), PATHS,
      geometry=modules.geometry(CONFIG))
  return tree


def rule(tree, block=BLOCK, steps=STEPS):
  found, = registry.rules(block, steps, tree)
  return found


def draw(rng, like):
  return jax.tree.map(
      lambda x: rng.standard_normal(x.shape).astype(np.float32), like)


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
  """PEFT's model after `STEPS` of SGD on random gradients, and ours after the
  same ones with the tensors of both after each."""
  where = tmp_path_factory.mktemp("adapter") / "a"
  tree = built()
  write(where, tree, total_step=STEPS)
  model = pretrained(folder, where, is_trainable=True)
  params, frozen = adapters_lib.split(tree)
  transform = rule(tree).wrap(optax.sgd(RATE))
  state = transform.init(params)

  @jax.jit
  def step(params, state, grads):
    updates, state = transform.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  named = {n.replace(".default", ""): p for n, p in model.named_parameters()
           if "lora_" in n}
  descent = torch.optim.SGD([p for p in named.values()], lr=RATE)
  rng, history = np.random.default_rng(0), []
  for t in range(1, STEPS + 1):
    grads = draw(rng, params)
    for name, g in peft_export.tensors(
        adapters_lib.join(grads, frozen), PATHS).items():
      named[name].grad = torch.from_numpy(g)
    descent.step()
    model.base_model.update_and_allocate(t)
    params, state = step(params, state, grads)
    ours = peft_export.tensors(adapters_lib.join(params, frozen), PATHS)
    assert ours.keys() == named.keys()
    history.append((ours, {
        n: p.detach().numpy().copy() for n, p in named.items()}))
  return model, adapters_lib.join(params, frozen), history


def test_pruning_is_pefts_step_by_step(run):
  kept = []
  for ours, theirs in run[2]:
    for name, value in theirs.items():
      np.testing.assert_allclose(ours[name], value, rtol=0, atol=1e-6)
      if name.endswith("lora_E"):
        np.testing.assert_array_equal(ours[name] != 0, value != 0)
    kept.append(sum(
        int((v != 0).sum()) for n, v in ours.items() if n.endswith("lora_E")))
  # 6 matrices: 24 triplets until step 2, 12 from 11 on, every second step
  # between, of which it is 12 (1 - 2/9)^3 + 12 at step 4. In between all of
  # them move.
  assert kept == [24, 24, 24, 17, 24, 14, 24, 12, 24, 12, 12, 12, 12, 12]


def test_the_budget_is_the_papers_and_pefts():
  found = [allocation.budget(t, 2520, 1680, 100, 800)
           for t in (0, 100, 101, 200, 450, 800, 1000)]
  assert found == [2520, 2520, 2516, 2208, 1785, 1680, 1680]
  theirs = object.__new__(RankAllocator)
  theirs.peft_config = peft.AdaLoraConfig(
      tinit=7, tfinal=11, total_step=90, target_r=3)
  theirs.init_bgt, theirs.target_bgt = 61, 40
  assert [allocation.budget(t, 61, 40, 7, 79) for t in range(91)] == [
      theirs.budget_schedule(t)[0] for t in range(91)]


def test_the_penalty_is_pefts(run):
  model, tree, _ = run
  ids = torch.from_numpy(np.asarray(TOKENS, np.int64))
  config = model.peft_config["default"]
  losses = []
  for weight in (0.5, 0.0):
    config.orth_reg_weight = weight
    with torch.no_grad():
      losses.append(float(model(ids, labels=ids).loss))
  params, _ = adapters_lib.split(tree)
  value, grads = jax.jit(jax.value_and_grad(rule(tree).penalty))(params)
  assert value == pytest.approx(losses[0] - losses[1], rel=1e-5)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_the_penalty_leaves_out_what_is_not_adapted():
  """Orthonormal A and B of rank 1 beside padding and an empty layer: zero."""
  one = jnp.zeros((2, 3, 2)).at[0, 0, 0].set(1.0)
  adapter = adalora.AdaLoRA(
      a=one, b=jnp.swapaxes(one, 1, 2), e=jnp.zeros((2, 2)),
      scale=jnp.ones(2), rate=jnp.zeros(2), rank=jnp.asarray([1, 0]))
  tree = base_lib.Adapters(layers={"q_proj": adapter})
  found = allocation.Allocation(adalora.Options(), 10).bound(tree)
  assert (found.matrices, found.triplets) == (1, 1)
  params, _ = adapters_lib.split(tree)
  value, grads = jax.value_and_grad(found.penalty)(params)
  assert value == 0 and not any(g.any() for g in jax.tree.leaves(grads))
  twice = jax.tree.map(lambda x: 2 * x, params)
  # |4 - 1| of A and of B, half of their mean.
  assert found.penalty(twice) == 1.5


class Tied(torch.nn.Module):
  """Four triplets of the same importance, and their gradients."""

  def __init__(self):
    super().__init__()
    for name, shape in {"A": (4, 3), "E": (4, 1), "B": (3, 4)}.items():
      p = torch.nn.Parameter(torch.ones(shape))
      p.grad = torch.ones(shape)
      self.register_module(
          f"lora_{name}", torch.nn.ParameterDict({"default": p}))


def test_ties_keep_the_budget_and_a_full_budget_prunes_nothing():
  """PEFT prunes all that equals its threshold, and fails for k = 0."""
  config = peft.AdaLoraConfig(target_r=2, tinit=0, tfinal=0, total_step=2)
  model = Tied()
  theirs = RankAllocator(model, config, "default")
  theirs.update_ipt(model)
  pattern = theirs.mask_to_budget(model, 2)
  assert sum(pattern["lora_E.default"]) == 0  # Of the budget's 2.
  with pytest.raises(RuntimeError):
    theirs.mask_to_budget(model, 4)
  for target, left in ((2, [0, 0, 1, 1]), (4, [1, 1, 1, 1])):
    tree = base_lib.Adapters(outer={"lm_head": adalora.AdaLoRA(
        a=jnp.ones((3, 4)), b=jnp.ones((4, 3)), e=jnp.ones(4),
        scale=jnp.ones(()), rate=jnp.zeros(()), rank=jnp.int32(4))})
    params, _ = adapters_lib.split(tree)
    transform = allocation.Allocation(
        adalora.Options(target_r=target), 1).bound(tree).wrap(
            optax.set_to_zero())
    updates, _ = transform.update(params, transform.init(params), params)
    e = optax.apply_updates(params, updates).outer["lm_head"].e
    np.testing.assert_array_equal(e, left)


def test_a_pruned_folder_of_peft_is_read_in_its_real_sizes(
    run, folder, tmp_path):
  model = run[0]
  config = model.peft_config["default"]
  # One matrix without any triplet, as happens.
  name = next(n for n in config.rank_pattern if "layers.1.self_attn" in n)
  config.rank_pattern[name] = [False] * 4
  model.save_pretrained(str(tmp_path / "a"))
  expected = peft_logits(pretrained(folder, tmp_path / "a"))
  loaded = read(tmp_path / "a")
  assert tiny.distance(our_logits(loaded.adapters), expected) < 2e-5
  found = {n: a.rank.tolist() for n, a in loaded.adapters.layers.items()}
  assert found["q_proj"][1] == 0
  assert sum(map(sum, found.values())) == sum(
      sum(flags) for flags in config.rank_pattern.values()) < 12
  scales = np.concatenate(
      [a.scale for a in loaded.adapters.layers.values()])
  np.testing.assert_allclose(scales[scales > 0], 8 / (4 + 1e-5), rtol=1e-6)
  peft_export.write(
      tmp_path / "b", loaded.adapters, loaded.peft_config, PATHS)
  first, second = (safetensors.numpy.load_file(
      tmp_path / f / peft_export.WEIGHTS) for f in "ab")
  for key, value in first.items():
    if value.size:
      assert value.tobytes() == second[key].tobytes(), key
  first, second = (json.loads((tmp_path / f / peft_export.CONFIG).read_text())
                   for f in "ab")
  assert first == second
  again = peft_logits(pretrained(folder, tmp_path / "b"))
  np.testing.assert_array_equal(again, expected)
  # Trained further it has nothing left to prune, and prunes nothing.
  further = rule(loaded.adapters, loaded.config)
  assert set(further.budgets().tolist()) == {further.triplets}


def test_in_its_real_sizes_it_is_a_lora(run, folder, tmp_path):
  _, tree, _ = run
  small = adalora.to_lora(tree)
  config = adalora.to_lora_config(BLOCK, small, PATHS)
  assert sum(a.rank.sum() for a in small.layers.values()) == 12
  assert all(a.a.shape[-1] == a.rank.max() for a in small.layers.values())
  expected = our_logits(tree)
  assert tiny.distance(our_logits(small), expected) < 1e-6
  assert tiny.distance(expected, our_logits(built())) > 1e-3
  write(tmp_path / "a", small, config)
  loaded = read(tmp_path / "a")
  assert loaded.config.method == "lora"
  assert tiny.distance(our_logits(loaded.adapters), expected) < 1e-6
  there = peft_logits(pretrained(folder, tmp_path / "a"))
  assert tiny.distance(there, expected) < 2e-5


def test_a_target_without_triplets_is_left_out():
  tree = built()
  q = tree.layers["q_proj"]
  tree = dataclasses.replace(tree, layers=tree.layers | {
      "q_proj": q.replace(e=q.e + 1.0)})
  small = adalora.to_lora(tree)
  assert list(small.layers) == ["q_proj"]
  assert small.layers["q_proj"].rank.tolist() == [4, 4, 4]


@pytest.mark.parametrize("fields, message", [
    ({"rank": 4, "options": {"target_r": 8}},
     "adapter.options.target_r=8 is above adapter.rank=4"),
    ({"options": {"tinit": 60, "tfinal": 40}}, "leave none of train.steps=100"),
    ({"options": {"beta1": 1.0}}, "adapter.options.beta1=1.0 is out of range"),
    ({"options": {"delta_t": 0}}, "adapter.options.delta_t=0 is out of range"),
])
def test_what_cannot_be_is_refused(fields, message):
  config = adapters_lib.AdapterConfig(method="adalora", **fields)
  with pytest.raises(errors.UsageError, match=message):
    registry.rules(config, 100)
