"""OFT, BOFT, HRA, RoAd and SHiRA by hand, and PEFT's variants of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import errors
from lora_jax.adapters import base as base_lib
from lora_jax.adapters import boft
from lora_jax.adapters import hra
from lora_jax.adapters import oft
from lora_jax.adapters import road
from lora_jax.adapters import shira
from tests.adapters import against

RNG = np.random.default_rng(0)


def normal(*shape):
  return RNG.standard_normal(shape).astype(np.float32)


def test_cayley_gives_rotations_and_the_series_is_close():
  q = 0.1 * normal(2, 6)  # Blocks of 4.
  one = np.int32(1)
  exact = oft.OFT(q, one, rows=8, options=oft.Options(4, neumann=False))
  r = exact.rotations()
  np.testing.assert_allclose(
      r @ r.swapaxes(1, 2), np.tile(np.eye(4), (2, 1, 1)), atol=1e-6)
  # The series has the other sign of Q.
  series = oft.OFT(-q, one, rows=8, options=oft.Options(4, terms=12))
  np.testing.assert_allclose(series.rotations(), r, atol=1e-6)
  five = oft.OFT(-q, one, rows=8, options=oft.Options(4, terms=5))
  assert 1e-6 < np.abs(five.rotations() - r).max() < 1e-2


def test_constrained_oft_stays_within_eps():
  q = normal(2, 6)
  adapter = oft.OFT(q, np.int32(1), rows=8, options=oft.Options(
      4, neumann=False, coft=True, eps=0.1))
  upper = oft.OFT(q, np.int32(1), rows=8, options=oft.Options(
      4, neumann=False)).rotations()
  r = adapter.rotations()
  # ||R - I|| of a Cayley transform is at most 2 ||Q||.
  assert float(jnp.linalg.norm(r - jnp.eye(4))) < 2 * 0.1
  assert float(jnp.linalg.norm(upper - jnp.eye(4))) > 1
  grad = jax.grad(lambda a: a.rotations().sum(), allow_int=True)(adapter)
  assert np.abs(grad.q).max() > 0


@pytest.mark.parametrize("options", [
    {"block_share": True}, {"use_cayley_neumann": False},
    {"num_cayley_neumann_terms": 3}, {"oft_block_size": 0, "r": 3},
    {"oft_block_size": 5}])  # 5 does not divide 12: it becomes 4.
def test_oft_variants_are_those_of_peft(options):
  peft = pytest.importorskip("peft")
  config = peft.OFTConfig(**{
      "oft_block_size": 4, "target_modules": ["q_proj"]} | options)
  against.check("oft", config, 12, 8)


@pytest.mark.parametrize("factors", [1, 2, 3])
def test_butterflies_by_hand(factors):
  i, o, b = 16, 5, 2
  options = boft.Options(block_size=b, factors=factors)
  q, s, w, x = normal(factors, 8, b, b), normal(o), normal(i, o), normal(3, i)
  adapter = boft.BOFT(q, s, np.int32(1))
  assert options.block(i) == b
  rotation = np.eye(i)
  for factor in range(factors):
    blocks = np.zeros((i, i))
    for n in range(8):
      skew = (q[factor, n] - q[factor, n].T) / 2
      at = slice(n * b, n * b + b)
      blocks[at, at] = (np.eye(b) - skew) @ np.linalg.inv(np.eye(b) + skew)
    order = boft.permutation(i, 8 // 2**factor, 1, factors > 1)
    p = np.eye(i)[order]
    rotation = (p @ blocks @ p.T) @ rotation
  np.testing.assert_allclose(rotation @ rotation.T, np.eye(i), atol=1e-5)
  expected = (x @ rotation @ w) * s
  np.testing.assert_allclose(adapter.apply(x, w), expected, atol=1e-4)
  np.testing.assert_allclose(x @ adapter.merge(w), expected, atol=1e-4)


def test_butterfly_permutations():
  assert boft.permutation(8, 1, 2, True).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
  # Two blocks of two pieces each stay as they are.
  assert boft.permutation(8, 2, 2, True).tolist() == list(range(8))
  peft_layer = pytest.importorskip("peft.tuners.boft.layer")
  for size, blocks, half in ((16, 8, 1), (16, 4, 1), (16, 2, 1), (32, 2, 2)):
    theirs = peft_layer.BOFTLayer.block_butterfly_perm(
        None, size, blocks, half, 1)
    assert boft.permutation(size, blocks, half, True).tolist() == (
        theirs.tolist())


def test_blocks_that_do_not_fit_are_named():
  with pytest.raises(errors.UsageError, match="12 inputs are no 1 butt"):
    boft.Options(block_size=5).block(12)
  with pytest.raises(errors.UsageError, match="give one of them"):
    oft.Options(block_size=4, blocks=2).validate()


def test_reflections_one_by_one():
  u, w, x = normal(6, 4), normal(6, 5), normal(3, 6)
  rotated = x.astype(np.float64)
  for j in reversed(range(4)):
    unit = u[:, j] / np.linalg.norm(u[:, j])
    rotated = rotated - 2 * np.outer(rotated @ unit, unit)
  adapter = hra.HRA(u, np.int32(4))
  np.testing.assert_allclose(adapter.apply(x, w), rotated @ w, atol=1e-5)
  np.testing.assert_allclose(x @ adapter.merge(w), rotated @ w, atol=1e-5)


def test_an_odd_number_of_reflections_is_refused():
  slot = base_lib.Slot(np.int32(3), np.float32(1), np.float32(0), width=3)
  with pytest.raises(errors.UsageError, match=r"adapter.rank=3.*even rank"):
    hra.init(jax.random.key(0), normal(6, 5), slot)


def test_a_quarter_turn():
  """Groups of 4: outputs 0 and 2, 1 and 3 are pairs."""
  adapter = road.Road(
      theta=np.full(2, np.pi / 2, np.float32), alpha=np.float32([1, 2]),
      rank=np.int32(1), options=road.Options(group_size=4))
  found = adapter.rotated(np.float32([[1, 2, 3, 4]]))
  np.testing.assert_allclose(found, [[-3, -8, 1, 4]], atol=1e-6)


@pytest.mark.parametrize("variant", ["road_2", "road_4"])
def test_road_variants_are_those_of_peft(variant):
  peft = pytest.importorskip("peft")
  against.check("road", peft.RoadConfig(
      variant=variant, group_size=4, target_modules=["q_proj"]), 6, 8)


def test_a_sparse_change_by_hand():
  index = np.int32([[0, 2], [1, 1]])  # (output, input)
  adapter = shira.SHiRA(np.float32([10, 20]), index, np.int32(1), (3, 4))
  expected = np.zeros((3, 4))
  expected[1, 0], expected[1, 2] = 10, 20
  np.testing.assert_array_equal(adapter.delta(), expected)
  with pytest.raises(errors.UsageError, match=r"rank=2: 14 entries.*12"):
    shira.init(jax.random.key(0), normal(3, 4), base_lib.Slot(
        np.int32(2), np.float32(1), np.float32(0), width=2, target="q_proj",
        options=shira.Options()))


@pytest.mark.parametrize("seed", [None, 3])
def test_the_entries_are_those_that_peft_draws(seed):
  peft = pytest.importorskip("peft")
  found = against.place(peft.ShiraConfig(
      r=2, random_seed=seed, target_modules=["q_proj"]), 12, 8)
  ours = shira.places(12, 8, 40, -1 if seed is None else seed)
  np.testing.assert_array_equal(found.start["shira_indices"], ours)
