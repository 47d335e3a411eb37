"""Initialisations: the formulas by hand, PEFT's functions, the golden facts."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import errors
from lora_jax import quant
from lora_jax.adapters import starts

SPEC = quant.QuantSpec(format="nf4", block_size=64, double=False)
decompose = jax.jit(
    lambda start, w, like, width, rank, scale: start.decompose(
        w, like, width, rank, scale, **dict(start.options)),
    static_argnums=(0, 3))


def weight(i=64, o=48, seed=0):
  """A matrix with a decaying spectrum and noise, as trained ones have."""
  rng = np.random.default_rng(seed)
  u, _ = np.linalg.qr(rng.normal(size=(i, min(i, o))))
  v, _ = np.linalg.qr(rng.normal(size=(o, min(i, o))))
  s = 3.0 * 0.6 ** np.arange(min(i, o))
  return jnp.asarray((u * s) @ v.T + 0.02 * rng.normal(size=(i, o)),
                     jnp.float32)


def taken(name, w, like=None, rank=4, width=None, scale=2.0, **options):
  like = w if like is None else like
  found = decompose(starts.choose(name, **options), w, like, width or rank,
                    jnp.int32(rank), jnp.float32(scale))
  return [np.asarray(quant.dequantize(found[0]), np.float64),
          *(np.asarray(x, np.float64) for x in found[1:])]


def truncated(w, rank):
  u, s, vt = np.linalg.svd(np.asarray(w, np.float64), full_matrices=False)
  return (u[:, :rank] * s[:rank]) @ vt[:rank]


def test_pissa_is_the_leading_part_and_the_rest():
  w = weight()
  rest, a, b = taken("pissa", w, rank=3, width=5)
  np.testing.assert_allclose(2.0 * a @ b, truncated(w, 3), atol=2e-6)
  np.testing.assert_allclose(rest + 2.0 * a @ b, w, atol=1e-6)
  # Both factors have the root of the singular values, and padding is zero.
  s = np.linalg.svd(np.asarray(w, np.float64), compute_uv=False)[:3]
  np.testing.assert_allclose((a**2).sum(0), [*(s / 2.0), 0, 0], atol=1e-6)
  np.testing.assert_allclose((b**2).sum(1), [*(s / 2.0), 0, 0], atol=1e-6)


def test_a_rank_beyond_the_matrix_takes_all_of_it():
  rest, a, b = taken("pissa", weight(6, 4), rank=8, scale=1.0)
  assert (a.shape, b.shape) == ((6, 8), (8, 4))
  assert np.abs(rest).max() < 1e-5


def test_the_randomised_svd_converges_to_the_exact_one():
  w = weight()
  best = np.linalg.norm(w - truncated(w, 4))
  excess = []
  for niter in (0, 1, 8):
    rest, a, b = taken(f"pissa_niter_{niter}", w)
    np.testing.assert_allclose(rest + 2.0 * a @ b, w, atol=1e-6)
    excess.append(np.linalg.norm(w - 2.0 * a @ b) / best - 1)
  assert excess[0] > 0.02 and excess[0] > 2 * excess[1] > excess[2]
  assert abs(excess[2]) < 1e-4


def test_loftq_alternates():
  w = weight()
  for iterations in (1, 3):
    q, a, b = taken("loftq", w, quant.quantize(w, SPEC), scale=0.5,
                    loftq_iterations=iterations)
    low = np.zeros(w.shape)
    for _ in range(iterations):
      expected = np.asarray(
          quant.quantize(jnp.asarray(w - low, jnp.float32), SPEC).dequantize())
      low = truncated(np.asarray(w, np.float64) - expected, 4)
    # A value within rounding of a threshold may fall on its other side.
    assert np.mean(np.abs(q - expected) > 1e-6) < 2e-3
    assert np.linalg.norm(0.5 * a @ b - low) < 1e-2 * np.linalg.norm(low)


@pytest.mark.parametrize("name", ["pissa", "pissa_niter_16"])
def test_pissa_is_that_of_peft(name):
  torch = pytest.importorskip("torch")
  peft = pytest.importorskip("peft")

  w = weight()
  linear = torch.nn.Linear(64, 48, bias=False)
  linear.weight.data = torch.tensor(np.asarray(w).T)
  torch.manual_seed(0)
  model = peft.get_peft_model(
      torch.nn.Sequential(linear), peft.LoraConfig(
          r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=name))
  module = model.base_model.model[0]
  rest, a, b = taken(name, w)
  theirs = [x.detach().numpy().T for x in (
      module.base_layer.weight, module.lora_A["default"].weight,
      module.lora_B["default"].weight)]
  np.testing.assert_allclose(rest, theirs[0], atol=2e-6)
  signs = np.sign((a * theirs[1]).sum(0))
  np.testing.assert_allclose(a * signs, theirs[1], atol=1e-5)
  np.testing.assert_allclose(b * signs[:, None], theirs[2], atol=1e-5)


def test_loftq_is_that_of_peft_at_scale_one():
  """On bitsandbytes' NF4, whose blocks ours equal for `i` a multiple of 64."""
  torch = pytest.importorskip("torch")
  pytest.importorskip("bitsandbytes")
  utils = pytest.importorskip("peft.utils.loftq_utils")

  # It insists on a GPU; all else is PEFT's own text.
  text = inspect.getsource(utils.loftq_init).replace('"cuda"', '"cpu"')
  space = dict(vars(utils))
  exec(text.replace("@torch.no_grad()", ""), space)
  w = weight()
  q, lora_a, lora_b = space["loftq_init"](
      torch.tensor(np.asarray(w).T), num_bits=4, reduced_rank=4,
      num_iter=2)
  ours = taken("loftq", w, quant.quantize(w, SPEC), scale=1.0,
               loftq_iterations=2)
  assert np.mean(np.abs(ours[0] - q.numpy().T) > 1e-6) < 2e-3
  theirs = (lora_b @ lora_a).numpy().T
  assert np.linalg.norm(ours[1] @ ours[2] - theirs) < (
      1e-2 * np.linalg.norm(theirs))


@pytest.mark.parametrize("fmt", ["nf4", "int4"])
def test_less_of_the_weight_is_lost_than_by_quantising_it(fmt):
  w = weight(576, 192, seed=3)  # The shape of SmolLM2's k_proj.
  like = quant.quantize(w, quant.QuantSpec(format=fmt))
  lost = {"qlora": np.linalg.norm(w - like.dequantize())}
  for name, options in (("pissa", {}), ("loftq", {}),
                        ("loftq", {"loftq_iterations": 5})):
    q, a, b = taken(name, w, like, rank=16, **options)
    lost[name, *options.values()] = np.linalg.norm(w - (q + 2.0 * a @ b))
  assert lost["loftq", 5] < lost["loftq",] < 0.95 * lost["qlora"]
  assert lost["pissa",] < 0.8 * lost["qlora"]


def test_drawn_starts():
  key = jax.random.key(0)
  a, b = starts.gaussian(key, 512, 8, 6, jnp.int32(4))
  assert not b.any() and not a[:, 4:].any()
  assert abs(float(a[:, :4].std()) - 1 / 4) < 0.01  # PEFT: std = 1/r
  a, b = starts.kaiming(key, 512, 8, 6, jnp.int32(4))
  assert not b.any() and not a[:, 4:].any()
  assert abs(float(a[:, :4].std()) - (3 * 512) ** -0.5) < 1e-3
  assert float(jnp.abs(a).max()) <= 512 ** -0.5


@pytest.mark.parametrize("name, message", [
    ("pisa", 'adapter.init="pisa" is unknown; did you mean "pissa"'),
    ("pissa_niter_<n>", "write a number"),
    ("pissa_niter_four", 'did you mean "pissa_niter_<n>"'),
    ("olora", "known: default, gaussian, loftq, pissa"),
])
def test_unknown_starts(name, message):
  with pytest.raises(errors.UsageError, match=message):
    starts.choose(name)
