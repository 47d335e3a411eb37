"""Which choices there are, in which order, and which of them is taken."""

from __future__ import annotations

import re

import numpy as np
import pytest

from lora_jax import errors
from lora_jax import host as host_lib
from lora_jax import types
from lora_jax.train import memory
from lora_jax.train import step

AUTO = step.Settings(remat="auto")
OPEN = memory.MemoryConfig()


def test_a_batch_is_split_in_the_order_of_its_rows():
  rows = np.arange(2 * 4 * 3).reshape(2, 4, 3)
  batch = types.Batch(*[rows] * 6)
  split = memory.Choice(parts=2).split(batch)
  assert split.tokens.shape == split.example_ids.shape == (4, 2, 3)
  np.testing.assert_array_equal(split.tokens.reshape(-1), np.arange(24))
  assert memory.Choice().split(batch).tokens.shape == rows.shape


def test_the_fastest_come_first():
  """Micro-batches of thousands of tokens cost less than `full`; small ones,
  which dequantise the base over and over, cost more."""
  found = memory.candidates(AUTO, OPEN, (4, 2048))
  named = {c.parts: i for i, c in enumerate(found)
           if (c.remat, c.mlp_tiles) == ("named", 1)}
  full = {c.parts: i for i, c in enumerate(found)
          if (c.remat, c.mlp_tiles) == ("full", 1)}
  assert found[0] == memory.Choice("none")
  assert named[1] < named[2] < full[1]
  small = memory.candidates(AUTO, OPEN, (4, 128))
  order = [(c.remat, c.parts) for c in small]
  assert order.index(("full", 1)) < order.index(("named", 2))
  # By hand: full remat and two micro-batches of 2048 tokens.
  assert memory.cost(memory.Choice("full", parts=2), 4096) == (
      pytest.approx(1.22 * (1 + 2 * 222 / 4096)))


def test_what_is_set_is_kept():
  fixed = step.Settings(remat="dots", offload=("base",))
  config = memory.MemoryConfig(micro_batch=2, mlp_tiles=3)
  assert memory.candidates(fixed, config, (4, 8192)) == [
      memory.Choice("dots", 3, ("base",), 2)]
  assert memory.start(fixed, config, 4) == memory.Choice(
      "dots", 3, ("base",), 2)
  assert memory.start(AUTO, OPEN, 4) == memory.Choice("named")
  assert {c.remat for c in memory.candidates(
      step.Settings(remat="full"), OPEN, (4, 64))} == {"full"}


def test_rows_are_cut_as_far_as_the_mesh_allows():
  parts = lambda ways: sorted({
      c.parts for c in memory.candidates(AUTO, OPEN, (12, 64), ways)})
  assert parts(1) == [1, 2, 3, 4, 6, 12]
  assert parts(4) == [1, 3]


def test_tiles_come_with_long_rows_only():
  tiles = lambda t: {c.mlp_tiles for c in memory.candidates(
      AUTO, OPEN, (1, t))}
  assert tiles(2048) == {1}
  assert tiles(16384) == {1, 8}


def test_what_may_be_offloaded():
  choices = lambda *kinds, **set_: memory.candidates(
      step.Settings(remat="auto", **set_), OPEN, (1, 64), kinds=kinds)
  kinds = lambda *some, **set_: {c.offload for c in choices(*some, **set_)}
  assert kinds() == {()}
  assert kinds("base", "activations") == {
      (), ("activations",), ("base",), ("activations", "base")}
  assert len(kinds(*memory.OFFLOAD)) == 8
  assert kinds(*memory.OFFLOAD, offload=("base",)) == {("base",)}
  # `activations` are the inputs of layers, which `full` alone has to keep.
  assert all(c.remat == "full" for c in choices(*memory.OFFLOAD)
             if "activations" in c.offload)
  assert set(memory.OFFLOAD) == set(host_lib.KINDS)


class Programs:
  """Needs of four choices; what was compiled is noted."""

  choices = tuple(
      memory.Choice(*c) for c in (
          ("none",), ("named",), ("full",), ("full", 1, (), 2)))

  def __init__(self):
    self.bounds = dict(zip(self.choices, (60, 28, 8, 6)))
    self.needs = dict(zip(self.choices, (70, 30, 10, 7)))
    self.compiled = []

  def need(self, choice):
    self.compiled.append(choice.remat)
    return self.needs[choice]

  def choose(self, budget):
    return memory.choose(
        self.choices, budget, self.bounds.__getitem__, self.need)


@pytest.mark.parametrize("budget, chosen, compiled, refused", [
    (70, 0, ["none"], None),
    (69, 1, ["none", "named"], (0, 70)),
    (59, 1, ["named"], (0, 60)),
    # named is compiled in vain: its bound fits.
    (29, 2, ["named", "full"], (0, 60)),
    # Beyond its bound full needs 2; what half the rows need is less.
    (8, 3, ["full", "full"], (0, 60)),
])
def test_the_first_that_fits(budget, chosen, compiled, refused):
  programs = Programs()
  plan = programs.choose(budget)
  choice = programs.choices[chosen]
  assert plan == memory.Plan(
      choice, programs.needs[choice], True,
      refused and (programs.choices[refused[0]], refused[1]))
  assert programs.compiled == compiled


def test_if_nothing_fits_it_is_the_smallest():
  programs = Programs()
  plan = programs.choose(5)
  assert (plan.choice, plan.need, plan.fits) == (
      programs.choices[-1], 7, False)
  assert programs.compiled == ["full"]


def test_text():
  choice = memory.Choice("full", 4, ("base", "activations"), 2)
  assert choice.text(3, 4) == (
      "remat=full, mlp_tiles=4, offload=base+activations, 6 micro-batches "
      "of 2")
  assert memory.Choice().text(1, 4) == "remat=named"


@pytest.mark.parametrize("config, message", [
    (dict(budget_gib=-1.0), "memory.budget_gib=-1.0 is out of range"),
    (dict(budget_gib=float("nan")), "memory.budget_gib=nan is out of range"),
    (dict(micro_batch=-2), "memory.micro_batch=-2 is out of range"),
    (dict(mlp_tiles=-1), "compute.mlp_tiles=-1 is out of range"),
])
def test_values_out_of_range(config, message):
  with pytest.raises(errors.UsageError, match=re.escape(message)):
    memory.MemoryConfig(**config).validate()


def test_a_micro_batch_that_does_not_divide():
  with pytest.raises(errors.UsageError, match=re.escape(
      "memory.micro_batch=5 does not divide train.batch_size=8; use 4")):
    memory.start(AUTO, memory.MemoryConfig(micro_batch=5), 8)
