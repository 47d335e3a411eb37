"""Initialisations: the formulas by hand, PEFT's functions, the golden facts."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax import quant
from lora_jax.adapters import registry
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


@pytest.mark.parametrize("name", ["pissa", "pissa_niter_16", "olora"])
def test_a_decomposition_is_that_of_peft(name):
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


def test_olora_is_a_qr_decomposition():
  w = weight(40, 24)
  rest, a, b = taken("olora", w, rank=3, width=5)
  q, r = np.linalg.qr(np.asarray(w, np.float64).T)
  np.testing.assert_allclose(a @ b, (q[:, :3] @ r[:3]).T, atol=1e-5)
  np.testing.assert_allclose(rest + 2.0 * a @ b, w, atol=1e-6)
  np.testing.assert_allclose(b[:3] @ b[:3].T, np.eye(3), atol=1e-6)
  assert not a[:, 3:].any() and not b[3:].any()


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


@pytest.mark.parametrize("rank", [2, 6])
def test_orthogonal_factors_are_not_zero_and_their_product_is(rank):
  a, b = starts.orthogonal(jax.random.key(0), 600, 500, 6, jnp.int32(rank))
  assert float(jnp.abs(a @ b).max()) < 1e-5
  assert not a[:, rank:].any() and not b[rank:].any()
  # Rows of A: N(0, 1) times orthonormal rows over 10, of r/2 directions.
  for x in (a[:, :rank], b[:rank].T):
    s = np.linalg.svd(x, compute_uv=False)
    assert np.all(s[:rank // 2] > 0.8 * len(x) ** 0.5 / 10)
    assert np.all(s[:rank // 2] < 1.2 * len(x) ** 0.5 / 10)
    assert np.all(s[rank // 2:] < 1e-5)


def test_orthogonal_is_that_of_peft(monkeypatch):
  """Draw by draw: PEFT's formula of the numbers that ours draws."""
  torch = pytest.importorskip("torch")
  peft = pytest.importorskip("peft")

  key = jax.random.key(1)
  shapes = ((4, 4), (10, 2), (2, 6))
  drawn = [torch.tensor(np.asarray(jax.random.normal(k, shape)))
           for k, shape in zip(jax.random.split(key, 3), shapes)]
  model = torch.nn.Sequential(torch.nn.Linear(10, 6, bias=False))
  with monkeypatch.context() as patch:
    patch.setattr(torch, "randn", lambda *shape: next(
        x for x in drawn if x.shape == shape))
    module = peft.get_peft_model(model, peft.LoraConfig(
        r=4, target_modules=["0"], init_lora_weights="orthogonal")
    ).base_model.model[0]
  a, b = starts.orthogonal(key, 10, 6, 4, jnp.int32(4))
  for ours, theirs in ((a, module.lora_A), (b, module.lora_B)):
    np.testing.assert_allclose(
        ours, theirs["default"].weight.detach().numpy().T, atol=1e-6)


def test_ranks_of_eva_go_to_what_explains_most():
  """By hand: five ranks among three modules."""
  ranks = {"q_proj": np.asarray([2, 0]), "k_proj": np.asarray([1, 0]),
           "o_proj": np.asarray([0, 2])}
  informed = starts.choose("eva", options={"rho": "1.5"}).informed
  limits = starts.components(informed, ranks)
  # round(2 * 1.5) = 3, also for k_proj, which reads what q_proj reads.
  assert {k: v.tolist() for k, v in limits.items()} == {
      "q_proj": [3, 0], "k_proj": [3, 0], "o_proj": [0, 3]}
  same = np.asarray([[0.5, 0.2, 0.1, 0.1], [0] * 4])
  own = np.asarray([[0] * 4, [0.3, 0.05, 0.04, 0.03]])
  moved = starts.redistributed(
      ranks, limits, {"q_proj": same, "k_proj": same, "o_proj": own})
  # 0.5 (q), 0.5 (k), 0.3 (o), 0.2 (q), 0.2 (k).
  assert {k: v.tolist() for k, v in moved.items()} == {
      "q_proj": [2, 0], "k_proj": [2, 0], "o_proj": [0, 1]}


def test_corda_damps_what_has_no_inverse():
  """With one input only, C has rank 1: what is added makes it invertible."""
  x, w = np.asarray([[3.0, 4.0, 0.0]]), np.random.default_rng(0).normal(
      size=(3, 5)).astype(np.float32)
  sums = {"gram": jnp.asarray(x.T @ x), "count": jnp.float32(1)}
  a, b = starts.choose("corda").informed.factors(
      sums, jnp.asarray(w), 3, jnp.int32(3), jnp.float32(2.0))
  # All of W is taken, whatever C is.
  np.testing.assert_allclose(2.0 * a @ b, w, atol=1e-4)
  fixed = x.T @ x + 0.01 * 25 / 3 * np.eye(3)
  s = np.linalg.svd(fixed @ w, compute_uv=False)
  np.testing.assert_allclose((b ** 2).sum(1), s / 2.0, rtol=1e-4)


def test_random_directions_are_the_same_of_a_and_b():
  g = weight(12, 10)
  informed = starts.choose(
      "lora_ga", options={"direction": "random", "scale": "unit"}).informed
  a, b = informed.factors(g, None, 3, jnp.int32(3), jnp.float32(1.0))
  u, s, vt = np.linalg.svd(np.asarray(g, np.float64))
  overlap = np.abs(u[:, :6].T @ a)
  chosen = overlap.argmax(0)
  assert len(set(chosen.tolist())) == 3
  np.testing.assert_allclose(overlap.max(0), 1.0, atol=1e-3)
  np.testing.assert_allclose(
      a @ b, (u[:, chosen] * s[chosen]) @ vt[chosen], atol=1e-3)


@pytest.mark.parametrize("fields, message", [
    (dict(init="orthogonal", rank=3), "adapter.rank=3 is odd"),
    (dict(init="orthogonal", rank_pattern={"q_proj": 5}), "is odd"),
    (dict(init="eva", init_options={"rho": 0.5}), "rho=0.5 is out of range"),
    (dict(init="eva", init_options={"tau": 1}), '"tau" is unknown'),
    (dict(init="corda", init_options={"corda_method": "ipn"}),
     'did you mean "ipm"'),
    (dict(init="lora_ga", init_options={"direction": "ArB3r"}),
     'did you mean "ArBr"'),
    (dict(init="lora_ga", init_options={"stable_gamma": 0}), "out of range"),
    (dict(init="pissa", init_options={"rho": 2}), "init=pissa has none"),
    (dict(init="eva", init_batches=0), "init_batches=0 is out of range"),
    (dict(init="olora", method="vera"), "is for lora, rslora, dora;"),
    (dict(init="gaussian", method="ia3"), "is for lora, rslora, dora, hira;"),
])
def test_blocks_that_cannot_be(fields, message):
  with pytest.raises(errors.UsageError, match=message):
    registry.checked(adapters_lib.AdapterConfig(**fields))


@pytest.mark.parametrize("name, message", [
    ("pisa", 'adapter.init="pisa" is unknown; did you mean "pissa"'),
    ("pissa_niter_<n>", "write a number"),
    ("pissa_niter_four", 'did you mean "pissa_niter_<n>"'),
    ("mica", "known: corda, default, eva, gaussian, loftq, lora_ga, olora, "
     "orthogonal, pissa"),
])
def test_unknown_starts(name, message):
  with pytest.raises(errors.UsageError, match=message):
    starts.choose(name)
