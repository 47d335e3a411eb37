"""Adapters of other ranks: what is kept, where, and that PEFT reads it."""

from __future__ import annotations

import dataclasses
import functools
import warnings

import jax
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax.adapters import assemble
from lora_jax.adapters import partition
from lora_jax.adapters import resize
from lora_jax.adapters import runs
from lora_jax.export import peft as peft_export
from lora_jax.models import init
from lora_jax.models import modules
from tests import tiny
from tests.adapters import contract

# transformers' Llama has all biases or none.
CONFIG = dataclasses.replace(contract.CONFIG, o_bias=True, mlp_bias=True)
PATHS, SHAPES = modules.paths(CONFIG), modules.shapes(CONFIG)
TOKENS = contract.batch().tokens
POSITIONS = np.tile(np.arange(12, dtype=np.int32), (2, 1))
Q, DOWN = "model.layers.{}.self_attn.q_proj", "model.layers.{}.mlp.down_proj"
# One rank of five in most places; none of layer 0's q_proj.
KEPT = {Q.format(0): [], Q.format(1): [2], Q.format(2): [4, 1, 0],
        DOWN.format(0): [3], DOWN.format(1): [0]}


@functools.cache
def base():
  return init.random_base(jax.random.key(0), CONFIG)


@functools.cache
def trained(method):
  block = adapters_lib.AdapterConfig(
      method=method, rank=5, alpha=8.0, targets="q_proj,down_proj")
  return block, tiny.random_adapters(CONFIG, base(), block)


def logits(tree):
  return np.asarray(tiny.logits(
      CONFIG, base(), TOKENS, POSITIONS, np.ones((2, 12), np.int32), tree))


def by_hand(tree):
  """The trained adapters with zeros in what is not kept."""
  layers = dict(tree.layers)
  for name, template in (("q_proj", Q), ("down_proj", DOWN)):
    one = layers[name]
    a, b, rank = (np.array(x) for x in (one.a, one.b, one.rank))
    for layer in range(CONFIG.n_layers):
      kept = KEPT.get(template.format(layer), range(5))
      gone = [n for n in range(5) if n not in kept]
      a[layer][:, gone] = b[layer][gone] = 0
      rank[layer] = len(kept)
    layers[name] = one.replace(a=a, b=b, rank=rank)
  return tree.replace(layers=layers)


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
def test_what_is_kept_computes_the_same(method, tmp_path):
  block, tree = trained(method)
  found = resize.resize(tree, KEPT, PATHS, SHAPES)
  expected = logits(by_hand(tree))
  assert tiny.distance(logits(found), expected) < 2e-6
  assert tiny.distance(logits(tree), expected) > 1e-3
  one = partition.module(found, "q_proj", 2)
  before = jax.device_get(partition.module(tree, "q_proj", 2))
  np.testing.assert_array_equal(one.a[:, :3], before.a[:, [4, 1, 0]])
  np.testing.assert_array_equal(one.b[:3], before.b[[4, 1, 0]])
  placed = assemble.placements(found)
  assert placed["q_proj"].rank.tolist() == [0, 1, 3]
  assert placed["down_proj"].rank.tolist() == [1, 1, 5]
  # A new adapter of the config has the same ranks, scales and stacks.
  config = resize.described(block, found, PATHS)
  for name, wanted in assemble.place(config, PATHS).items():
    np.testing.assert_array_equal(placed[name].rank, wanted.rank)
    adapted = wanted.rank > 0
    np.testing.assert_array_equal(
        placed[name].scale[adapted], wanted.scale[adapted])
  _, fresh = adapters_lib.build(
      jax.random.key(0), config, base(), PATHS,
      geometry=modules.geometry(CONFIG))
  shapes = lambda tree: jax.tree.map(
      lambda x: x.shape, adapters_lib.split(tree)[0])
  assert shapes(fresh) == shapes(found)

  peft = pytest.importorskip("peft")
  pytest.importorskip("torch")
  peft_export.write(
      tmp_path / "a", found, peft_export.peft_config(config, found, PATHS),
      PATHS)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    model = peft.PeftModel.from_pretrained(
        tiny.to_torch(CONFIG, base(), tmp_path / "base"), str(tmp_path / "a"))
  assert tiny.distance(
      expected, tiny.torch_logits(model.eval(), TOKENS)) <= 2e-5
  ranks = {n.removeprefix("base_model.model."): m.r["default"]
           for n, m in model.named_modules() if hasattr(m, "r")}
  assert ranks == {Q.format(1): 1, Q.format(2): 3, DOWN.format(0): 1,
                   DOWN.format(1): 1, DOWN.format(2): 5}


def test_it_is_cut_into_runs_and_can_be_resized_again():
  """5 5 5 -> 1 1 5 of each target, and then 1 1 0."""
  _, tree = trained("lora")
  one = {p.format(i): [0] for p in (Q, DOWN) for i in range(2)}
  found = resize.resize(tree, one, PATHS, SHAPES)
  assert [s.a.shape for s in found.layers["q_proj"].stacks] == [
      (2, 32, 1), (1, 32, 5)]
  assert adapters_lib.trainable_size(found) == 7 * (64 + 80)
  last = {p.format(2): [] for p in (Q, DOWN)}
  again = resize.resize(found, last, PATHS, SHAPES)
  assert again.layers["q_proj"].ends == (2, 3)
  assert again.layers["q_proj"].stacks[1] is None
  both = resize.resize(tree, one | last, PATHS, SHAPES)
  assert jax.tree.structure(both) == jax.tree.structure(again)
  np.testing.assert_array_equal(logits(both), logits(again))
  same = resize.resize(again, {}, PATHS, SHAPES)
  np.testing.assert_array_equal(logits(same), logits(again))
  assert isinstance(same.layers["q_proj"], runs.Runs)


@pytest.mark.parametrize("kept, message", [
    ({Q.format(7): [0]}, f'"{Q.format(7)}" is not adapted; did you mean'),
    ({Q.format(0): [5]}, "ranks 0 to 4"),
    ({Q.format(0): [1, 1]}, "kept once"),
])
def test_refused(kept, message):
  _, tree = trained("lora")
  with pytest.raises(errors.UserError, match=message):
    resize.resize(tree, kept, PATHS, SHAPES)


def test_a_method_without_ranks():
  block = adapters_lib.AdapterConfig(method="ia3", targets="k_proj")
  tree = tiny.random_adapters(CONFIG, base(), block)
  with pytest.raises(TypeError, match="has no ranks"):
    resize.resize(tree, {}, PATHS, SHAPES)
