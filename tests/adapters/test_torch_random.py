"""torch's random numbers without torch: golden ones, and torch itself."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import errors
from lora_jax.adapters import torch_random

SEEDS = (0, 777, 2**32 - 1, 2**32 + 5, 2**40 + 7, 2**64 - 1, -5, -2**63)
UP_TO = 2**28 - 1  # Below 2^28, an integer is a word modulo its bound.


@pytest.fixture
def torch():
  return pytest.importorskip("torch")


@pytest.fixture
def vector(torch):
  if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
    pytest.skip("this CPU's torch rounds otherwise")
  return torch


def both(torch, seed):
  return (torch_random.Generator(seed),
          torch.Generator().manual_seed(seed))


def word(torch, theirs):
  return int(torch.randint(UP_TO, (1,), generator=theirs))


def same_state(torch, ours, theirs):
  assert int(ours.words(1)[0]) % UP_TO == word(torch, theirs)


def close(ours, theirs, atol=1e-6):
  assert ours.dtype == np.float32
  np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=atol)


def test_words_are_the_published_ones():
  # The 10,000th of seed 5489 is what the C++ standard requires of mt19937.
  words = torch_random.Generator(5489).words(10_000)
  assert words.dtype == np.uint32
  assert (words[0], words[-1]) == (3499211612, 4123659995)


def test_golden_draws():
  new = torch_random.Generator
  assert new(777).randperm(10).tolist() == [5, 9, 0, 3, 1, 7, 4, 8, 6, 2]
  assert new(777).randperm(4096 * 4096, first=5).tolist() == [
      1374311, 8240085, 6766295, 6474818, 14786199]
  assert [float(x).hex() for x in new(0).uniform((4,), -0.25, 0.25)] == [
      "-0x1.eaa8000000000p-10", "0x1.12a8bc0000000p-3",
      "-0x1.a5662c0000000p-3", "-0x1.78cd000000000p-3"]
  assert new(0).uniform((4,), -0.25, 0.25, jnp.bfloat16).tolist() == [
      -0.00186920166015625, 0.1337890625, -0.2060546875, -0.18359375]
  np.testing.assert_array_equal(
      new(0).normal((3,)),
      np.float32([1.5409960746765137, -0.293428897857666, -2.1787893772125244]))
  np.testing.assert_allclose(new(0).normal((17,)), [
      -1.1258398294448853, -1.6959311962127686, 0.5666506290435791,
      0.7935083508491516, 0.5988394618034363, -1.5550950765609741,
      -0.3413603901863098, 1.85300612449646, 0.46809640526771545,
      -0.5854975581169128, -0.1733967512845993, 0.18347793817520142,
      1.3893661499023438, 1.586334228515625, 0.946298360824585,
      -0.843676745891571, 0.9318265914916992], rtol=0, atol=1e-6)
  # VeRA's _kaiming_init of (2, 3).
  assert [float(x).hex() for x in new(0).kaiming_uniform((2, 3)).ravel()] == [
      "-0x1.5af2440000000p-7", "0x1.846d380000000p-1",
      "-0x1.29f9620000000p+0", "-0x1.0a703a0000000p+0",
      "-0x1.16e1ac0000000p-1", "0x1.8455560000000p-2"]


@pytest.mark.parametrize("seed", SEEDS)
def test_seeds(torch, seed):
  ours, theirs = both(torch, seed)
  want = torch.randint(UP_TO, (700,), generator=theirs)
  np.testing.assert_array_equal(ours.words(700) % UP_TO, want)


def test_without_a_seed(torch):
  np.testing.assert_array_equal(
      torch_random.Generator().randperm(50),
      torch.randperm(50, generator=torch.Generator()))


@pytest.mark.parametrize("seed", [2**64, -2**63 - 1, 1.0, None, "7", True])
def test_no_seed(seed):
  with pytest.raises(errors.UserError, match=f"seed {seed!r} .*write an int"):
    torch_random.Generator(seed)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 17, 1000, 100_000])
def test_randperm(torch, n):
  for seed in SEEDS[:3]:
    ours, theirs = both(torch, seed)
    got = ours.randperm(n)
    assert got.dtype == np.int64
    np.testing.assert_array_equal(got, torch.randperm(n, generator=theirs))
    same_state(torch, ours, theirs)


def test_first_of_a_large_permutation(torch):
  n = 4096 * 1024
  want = torch.randperm(n, generator=torch.Generator().manual_seed(4))
  for first in (0, 1, 1000, n // 2, n):
    got = torch_random.Generator(4).randperm(n, first)
    np.testing.assert_array_equal(got, want[:first])


def test_first_leaves_the_state_of_all(torch, monkeypatch):
  monkeypatch.setattr(torch_random, "BLOCK", 64)  # Several of them.
  ours, theirs = both(torch, 3)
  for n, first in ((1000, 7), (500, 0), (64, 64), (130, 1)):
    got = ours.randperm(n, first)
    np.testing.assert_array_equal(
        got, torch.randperm(n, generator=theirs)[:first])
  same_state(torch, ours, theirs)


@pytest.mark.parametrize("first", [-1, 5])
def test_too_many_places(first):
  with pytest.raises(errors.UserError, match=f"{first} places of 4 .*most 4"):
    torch_random.Generator(0).randperm(4, first)


def test_inside_out_is_the_loop(monkeypatch):
  monkeypatch.setattr(torch_random, "BLOCK", 64)
  monkeypatch.setattr(torch_random, "LARGE", 1)
  for n in (1, 2, 40, 300):
    words = torch_random.Generator(6).words(2 * n + 1).tolist()
    x = [0] * n
    for i in range(n):
      z = (words[2 * i] * 2**32 + words[2 * i + 1]) % (i + 1)
      x[i], x[z] = x[z], i
    for first in {0, 1, n // 3, n}:
      ours = torch_random.Generator(6)
      got = ours.randperm(n, first)
      assert got.dtype == np.int64
      assert got.tolist() == x[:first]
      assert ours.words(1)[0] == words[-1]


@pytest.mark.slow  # Half a billion words; torch would take 1.6 GiB.
def test_where_the_algorithm_changes():
  # What torch 2.13 gives for seed 7, and two words modulo `UP_TO` thereafter.
  for n, places, after in (
      (214748363, [112993252, 117420445, 128500308], [239890719, 5322777]),
      (214748364, [93268064, 63068233, 165770247], [73671941, 75772412])):
    ours = torch_random.Generator(7)
    assert ours.randperm(n, 3).tolist() == places
    assert (ours.words(2) % UP_TO).tolist() == after


@pytest.mark.parametrize("low, high", [
    (0, 1), (-0.1, 0.1), (-0.0123, 0.0123), (1, 1.001), (-3, 7)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_uniform(vector, low, high, dtype):
  ours, theirs = both(vector, 3)
  want = vector.empty(3, 40_001, dtype=getattr(vector, dtype))
  want.uniform_(low, high, generator=theirs)
  got = ours.uniform((3, 40_001), low, high, jnp.dtype(dtype))
  assert got.dtype == jnp.dtype(dtype)
  np.testing.assert_array_equal(
      got.astype(np.float32), want.float().numpy())
  same_state(vector, ours, theirs)


@pytest.mark.parametrize("a", [0.0, 5**0.5, 0.2])
@pytest.mark.parametrize("shape", [(7, 300), (300, 7), (5, 3, 11)])
def test_kaiming_uniform(vector, a, shape):
  ours, theirs = both(vector, 11)
  want = vector.nn.init.kaiming_uniform_(
      vector.empty(shape), a=a, generator=theirs)
  np.testing.assert_array_equal(ours.kaiming_uniform(shape, a), want)
  same_state(vector, ours, theirs)


def test_kaiming_uniform_is_that_of_vera_and_randlora(vector):
  randlora = pytest.importorskip("peft.tuners.randlora.model")
  vera = pytest.importorskip("peft.tuners.vera.model")
  ours, theirs = both(vector, 5)
  for shape in ((4, 48), (96, 4)):
    np.testing.assert_array_equal(
        ours.kaiming_uniform(shape), vera._kaiming_init(shape, theirs))
  for shape in ((4, 1, 48), (96, 1, 4)):
    want = randlora._kaiming_init(shape, theirs)
    assert want.dtype == vector.bfloat16  # float16 where a GPU has no bfloat16.
    np.testing.assert_array_equal(
        ours.kaiming_uniform(shape, 5**0.5, jnp.bfloat16).astype(np.float32),
        want.float())


def test_normal_of_few(torch):
  # The second of a pair waits for the next call, whatever is drawn between.
  ours, theirs = both(torch, 2)
  for shape in ((3,), (5, 3), (), (1,), (0,), (2, 2)):
    close(ours.normal(shape), torch.randn(shape, generator=theirs))
    np.testing.assert_array_equal(
        ours.randperm(9, 2), torch.randperm(9, generator=theirs)[:2])
  same_state(torch, ours, theirs)


@pytest.mark.parametrize("size", [16, 17, 31, 32, 33, 100_003])
def test_normal_of_many(vector, size):
  for seed in SEEDS[:3]:
    ours, theirs = both(vector, seed)
    close(ours.normal((size,)), vector.randn(size, generator=theirs))
    same_state(vector, ours, theirs)


def test_normal_with_a_mean(vector):
  ours, theirs = both(vector, 8)
  for size in (4, 50):
    want = vector.normal(
        mean=0.5, std=0.02, size=(size, 3), generator=theirs)
    # Of numbers below 1, the last bit and what 1e-6 deviations come to.
    close(ours.normal((size, 3), 0.5, 0.02), want, 2**-24 + 2e-8)


def test_tinylora_projection(vector):
  layer = pytest.importorskip("peft.tuners.tinylora.layer")
  one = layer.TinyLoraLayer(vector.nn.Linear(6, 6), layer_idx=2)
  one.r["default"] = 3
  one._init_projection("default", 5, 42)
  want = one.tinylora_P["default"]
  close(torch_random.Generator(42 + 2).normal((5, 3, 3), std=3**-0.5), want)


def test_places_of_fourierft_and_shira(torch):
  fourierft = pytest.importorskip("peft.tuners.fourierft")
  config = fourierft.FourierFTConfig(n_frequency=5, random_loc_seed=9)
  layer = fourierft.FourierFTLinear(
      torch.nn.Linear(6, 8), "default", config, n_frequency=5)
  places = torch_random.Generator(9).randperm(6 * 8, 5)
  np.testing.assert_array_equal(
      layer.indices["default"], [places // 6, places % 6])
  shira = pytest.importorskip("peft.tuners.shira.mask_functions")
  for seed in (9, None):  # None is not random, but torch's own seed.
    mask = shira.random_mask(torch.nn.Linear(6, 8), r=2, random_seed=seed)
    ours = torch_random.Generator(*[] if seed is None else [seed])
    np.testing.assert_array_equal(
        np.flatnonzero(mask), np.sort(ours.randperm(6 * 8, 2 * (6 + 8))))


@pytest.mark.parametrize("seed", SEEDS)
def test_mixed_draws(vector, seed):
  ours, theirs = both(vector, seed)
  order = np.random.default_rng(0).integers(0, 5, 40)
  for kind in order:
    if kind == 0:
      close(ours.normal((7,)), vector.randn(7, generator=theirs))
    elif kind == 1:
      close(ours.normal((3, 9)), vector.randn(3, 9, generator=theirs))
    elif kind == 2:
      np.testing.assert_array_equal(
          ours.uniform((2, 5)), vector.rand(2, 5, generator=theirs))
    elif kind == 3:
      np.testing.assert_array_equal(
          ours.randperm(30), vector.randperm(30, generator=theirs))
    else:
      np.testing.assert_array_equal(
          ours.randperm(800, 3), vector.randperm(800, generator=theirs)[:3])
  same_state(vector, ours, theirs)
