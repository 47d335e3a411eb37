"""OFT, BOFT, HRA, RoAd and SHiRA by hand, and PEFT's variants of them."""

from __future__ import annotations

import collections

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax.adapters import base as base_lib
from lora_jax.adapters import boft
from lora_jax.adapters import hra
from lora_jax.adapters import oft
from lora_jax.adapters import registry
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
    {"coft": True, "eps": 0.5}, {"coft": True, "eps": 0.5, "block_share": True},
    {"module_dropout": 0.5},  # Which PEFT applies nowhere.
    {"oft_block_size": 5}])  # 5 does not divide 12: it becomes 4.
def test_oft_variants_are_those_of_peft(options):
  peft = pytest.importorskip("peft")
  config = peft.OFTConfig(**{
      "oft_block_size": 4, "target_modules": ["q_proj"]} | options)
  against.check("oft", config, 12, 8)


def test_constrained_oft_is_trained_as_in_peft():
  """Where PEFT projects before a product, ours does so after a step."""
  peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
  config = peft.OFTConfig(
      oft_block_size=4, coft=True, eps=0.3, target_modules=["q_proj"])
  torch.manual_seed(0)
  linear = torch.nn.Linear(12, 8, bias=False)
  x, w = torch.randn(5, 12), linear.weight.detach().numpy().T.copy()
  model = peft.get_peft_model(torch.nn.Sequential(
      collections.OrderedDict(q_proj=linear)), config)
  steps, rate = 6, 0.05
  optimizer = torch.optim.SGD(
      [p for p in model.parameters() if p.requires_grad], rate)
  for _ in range(steps):
    optimizer.zero_grad()
    torch.sin(model(x)).sum().backward()
    optimizer.step()
  theirs = model(x).detach().numpy()

  slot = against.slot("oft", config, 12, 8)
  tree = base_lib.Adapters(outer={"q_proj": oft.init(None, w, slot)})
  params, frozen = adapters_lib.split(tree)
  rule, = registry.rules(adapters_lib.AdapterConfig(
      method="oft", options=slot.options), steps, tree)
  transform = rule.wrap(optax.sgd(rate))

  def product(params):
    return adapters_lib.join(params, frozen).outer["q_proj"].apply(
        x.numpy(), w)

  @jax.jit
  def step(params, state):
    grads = jax.grad(lambda p: jnp.sin(product(p)).sum())(params)
    updates, state = transform.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  state = transform.init(params)
  for _ in range(steps):
    params, state = step(params, state)
  np.testing.assert_allclose(product(params), theirs, atol=1e-5)
  # The constraint binds, in every block.
  norms = np.linalg.norm(params.outer["q_proj"].q, axis=1) * 2**0.5
  np.testing.assert_allclose(norms, 0.3 / 3**0.5, rtol=1e-5)
  assert registry.rules(adapters_lib.AdapterConfig(method="oft"), steps) == ()


@pytest.mark.parametrize("factors", [1, 2, 3])
def test_butterflies_by_hand(factors):
  i, o, b = 16, 5, 2
  options = boft.Options(block_size=b, factors=factors)
  q, s, w, x = normal(factors, 8, b, b), normal(o), normal(i, o), normal(3, i)
  adapter = boft.BOFT(q, s, np.float32(0), np.int32(1))
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


def test_dropout_leaves_out_blocks_of_one_butterfly():
  """A share `rate` of one factor's blocks is I, as in PEFT."""
  q = normal(3, 8, 2, 2)
  adapter = boft.BOFT(q, normal(5), np.float32(0.3), np.int32(1))
  seen = set()
  for seed in range(8):
    key = jax.random.key(seed)
    dropped = np.asarray(adapter._dropped(key))[..., 0, 0]
    assert sorted(dropped.sum(1)) == [0, 0, 2]  # floor(0.3 * 8).
    seen.add(dropped.tobytes())
    without = boft.BOFT(q * ~dropped[..., None, None], *(
        adapter.s, adapter.rate, adapter.rank))
    noise = adapters_lib.Noise(key, np.zeros((1, 3)), np.zeros((1, 3)))
    x = normal(3, 16)
    np.testing.assert_allclose(
        adapter.rotated(x, noise), without.rotated(x), atol=1e-6)
  assert len(seen) > 4


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
  adapter = hra.HRA(u, np.int32(4), False)
  np.testing.assert_allclose(adapter.apply(x, w), rotated @ w, atol=1e-5)
  np.testing.assert_allclose(x @ adapter.merge(w), rotated @ w, atol=1e-5)


@pytest.mark.parametrize("options", [{"r": 3}, {"r": 4, "apply_GS": True}])
def test_reflections_that_cannot_cancel_are_those_of_peft(options):
  """They are not the base at the start."""
  peft = pytest.importorskip("peft")
  config = peft.HRAConfig(target_modules=["q_proj"], **options)
  against.check("hra", config, 12, 8)
  assert against.start_distance("hra", config, 12, 8) > 0.1


def test_gram_schmidt_by_hand():
  """u_1 = (3, 4), and u_2 becomes a multiple of (4, -3): what is left of
  I - 2 (u_1 u_1' + u_2 u_2') is -I."""
  u = np.float32([[3, 1], [4, 0], [0, 0]])
  adapter = hra.HRA(u, np.int32(2), True)
  x = np.float32([[1, 2, 3]])
  np.testing.assert_allclose(
      adapter.apply(x, np.eye(3, dtype=np.float32)), [[-1, -2, 3]], atol=1e-6)


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
