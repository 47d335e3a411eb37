"""DoRA's norms without a second weight, and what a step makes of them."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import quant
from lora_jax import types
from lora_jax.adapters import dora
from lora_jax.models import config as config_lib
from lora_jax.models import init
from lora_jax.train import step as step_lib
from tests import tiny

I, O, R = 256, 96, 6


def weight(fmt="nf4", i=I, o=O, key=0):
  w = 0.02 * jax.random.normal(jax.random.key(key), (i, o))
  return w if fmt == "none" else quant.quantize(w, quant.QuantSpec(fmt))


def adapter(w, a, b, scale=2.0, rank=None, **fields):
  fields = {"square": dora.squares(w), "m": jnp.ones(b.shape[1])} | fields
  return dora.DoRA(
      a=jnp.asarray(a, jnp.float32), b=jnp.asarray(b, jnp.float32),
      scale=jnp.float32(scale), rate=jnp.float32(0),
      rank=jnp.int32(a.shape[1] if rank is None else rank), **fields)


def whole(one, w):
  """V, in float64."""
  return np.float64(quant.dequantize(w)) + float(one.scale) * (
      np.float64(one.a) @ np.float64(one.b))


def trained(w, rho, aligned, rng):
  """(A, B) with ||2 A B|| = rho ||W|| in every column, of random directions or
  W's own, where the cross term is as large as it can be."""
  w = np.float64(quant.dequantize(w))
  if aligned:
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    a, b = u[:, :R] * s[:R], vt[:R]
  else:
    a = rng.uniform(-1, 1, (len(w), R)) / len(w) ** 0.5
    b = rng.normal(size=(R, w.shape[1]))
  norm = lambda v: np.linalg.norm(v, axis=0)
  return a, b * rho * norm(w) / norm(2 * a @ b)


@pytest.mark.parametrize("fmt", ["none", "nf4", "int4_affine"])
def test_norms_are_those_of_the_whole_weight(fmt):
  w, rng = weight(fmt), np.random.default_rng(0)
  for rho, aligned, rank in (
      (0.0, False, R), (0.3, False, 4), (0.3, True, R), (3.0, False, R)):
    a, b = trained(w, rho, aligned, rng)
    a[:, rank:], b[rank:] = 0, 0  # As layers of a smaller rank are padded.
    one = adapter(w, a, b, rank=rank)
    want = np.linalg.norm(whole(one, w), axis=0)
    np.testing.assert_allclose(jax.jit(one.norms)(w), want, rtol=1e-6)
    # Nobody told it what ||W0||^2 is, or it is asked for the real thing.
    np.testing.assert_allclose(
        one.replace(square=None).norms(w), want, rtol=1e-6)
    np.testing.assert_allclose(one.prepared(w).c, want, rtol=1e-6)


@pytest.mark.parametrize("rho", [0.01, 0.1, 0.3])
@pytest.mark.parametrize("aligned", [False, True])
def test_bfloat16_is_good_to_four_digits(rho, aligned):
  """The largest of 96 columns, of which the text's estimate is the size of one:
  at 30% 1.5e-5. Sums in bfloat16 would be 2e-4 off in W's directions."""
  w = weight(i=1024)
  one = adapter(w, *trained(w, rho, aligned, np.random.default_rng(1)))
  want = np.linalg.norm(whole(one, w), axis=0)
  x = jnp.ones((3, 1024), jnp.bfloat16)
  apart = one.norms(w, jnp.bfloat16)
  y, cross = quant.joint_matmul(x, [w, w], [one.factors()] * 2, crosses=True)[1]
  assert y.dtype == jnp.bfloat16 and cross.dtype == jnp.float32
  joint = one.norms(w, jnp.bfloat16, cross)
  for got in (apart, joint):
    assert np.abs(got / want - 1).max() < 1e-4


def test_what_is_joined_is_what_is_apart():
  """Other ranks and widths beside one another, and a LoRA among them."""
  rng = np.random.default_rng(2)
  outs, ranks = (O, 32, 64), (6, 2, 4)
  weights = [weight(o=o, key=o) for o in outs]
  ones = [
      adapter(w, rng.normal(size=(I, r)) / I, rng.normal(size=(r, o)),
              m=jnp.asarray(rng.uniform(1, 2, o), jnp.float32))
      for w, o, r in zip(weights, outs, ranks)]
  ones[1] = adapters_lib.METHODS["lora"].adapter(
      **{f: getattr(ones[1], f) for f in ("a", "b", "scale", "rate", "rank")})
  x = jax.random.normal(jax.random.key(1), (5, I))

  @functools.partial(jax.jit, static_argnums=1)
  def run(x, join):
    return adapters_lib.project_all(x, weights, ones, [None] * 3, join)

  exact = run(x, False)
  for got, want in zip(run(x.astype(jnp.bfloat16), True), exact):
    error = np.linalg.norm(np.float32(got) - want) / np.linalg.norm(want)
    assert error < 2**-8
  for got, want in zip(run(x, True), exact):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_weight_that_its_delta_cancels(dtype):
  """V = 0 but for rounding: what is left has no direction to be scaled up."""
  o = 64
  w = weight("none", o=o)
  turn, _ = np.linalg.qr(np.random.default_rng(4).normal(size=(o, o)))
  one = adapter(w, np.asarray(w) @ turn, -turn.T, scale=1.0)
  x = jax.random.normal(jax.random.key(1), (16, I), dtype)

  def total(m, x):
    y = one.replace(m=m).apply(x, w)
    return jnp.sum(y.astype(jnp.float32) ** 2), y

  (_, y), (d_m, d_x) = jax.value_and_grad(
      total, (0, 1), has_aux=True)(one.m, x)
  base = np.abs(np.float32(x @ w.astype(dtype))).max()
  assert np.isfinite(d_m).all() and np.isfinite(np.float32(d_x)).all()
  size = np.linalg.norm(np.asarray(w), axis=0)
  gain = one.gain(one.norms(w, dtype))
  assert (np.asarray(gain) * size <= 256 * (1 + 1e-6)).all()
  # Some columns' c^2 is negative or 0 of itself, and they are scaled, too.
  assert (np.asarray(gain) * size >= 30).all()
  assert np.abs(np.float32(y)).max() <= 3 * base
  # Nothing at all stays nothing.
  none = adapter(0 * w, np.zeros((I, 2)), np.zeros((2, o)))
  np.testing.assert_array_equal(none.apply(x, 0 * w), 0)


def test_the_norms_are_constants_to_the_gradient():
  """d m = sum_t g y / c and d B = A^T x^T (g m / c), section 4.3."""
  rng = np.random.default_rng(3)
  w = weight()
  one = adapter(w, rng.normal(size=(I, R)) / I, rng.normal(size=(R, O)),
                m=jnp.asarray(rng.uniform(1, 2, O), jnp.float32))
  x, g = rng.normal(size=(7, I)), rng.normal(size=(7, O))
  v = whole(one, w)
  c, m = np.linalg.norm(v, axis=0), np.float64(one.m)
  want = {"m": (g * (x @ v)).sum(0) / c,
          "b": 2 * (x @ np.float64(one.a)).T @ (g * m / c),
          "a": 2 * x.T @ (g * m / c) @ np.float64(one.b).T}

  def total(fields, x, join):
    y, = adapters_lib.project_all(
        x, [w], [one.replace(**fields)], [None], join)
    return jnp.sum(y.astype(jnp.float32) * g)

  fields = {name: getattr(one, name) for name in want}
  grad = jax.jit(jax.grad(total), static_argnums=2)
  for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)):
    for join in (False, True):
      got = grad(fields, jnp.asarray(x, dtype), join)
      for name, value in want.items():
        error = np.linalg.norm(got[name] - value) / np.linalg.norm(value)
        assert error < tolerance, (dtype, join, name, error)


def test_a_start_that_changes_the_base_is_followed():
  config = tiny.CONFIGS["llama"]
  base = init.random_base(jax.random.key(0), config)
  block = adapters_lib.AdapterConfig(
      method="dora", rank=2, init="pissa", targets="q_proj,embed_tokens")
  after, tree = adapters_lib.build(
      jax.random.key(1), block, base, tiny.paths(config))
  assert not np.array_equal(
      after.layers["q_proj"].weight, base.layers["q_proj"].weight)
  for name, one in (tree.layers | tree.outer).items():
    w = (after.layers[name].weight if name in after.layers
         else after.embed_tokens)
    np.testing.assert_allclose(
        one.square, (np.float64(w) ** 2).sum(-2), rtol=1e-6)


CONFIG = config_lib.ModelConfig(
    family="llama", vocab_size=40, d_model=96, d_ff=160, n_layers=2, n_heads=4,
    n_kv_heads=2, head_dim=24, tie_embeddings=False)
B, T = 3, 24


@functools.cache
def step():
  """Arguments of a bfloat16 step, every product of which is joined."""
  base = init.quantised_base(jax.random.key(0), CONFIG, quant.QuantSpec("nf4"))
  block = adapters_lib.AdapterConfig(method="dora", rank=4)
  _, tree = adapters_lib.build(
      jax.random.key(1), block, base, tiny.paths(CONFIG))
  rows = jnp.ones((B, T), jnp.int32)
  data = types.Batch(rows, rows, rows.astype(jnp.float32), rows, rows, rows)
  return *adapters_lib.split(tree), base, data, jax.random.key(2)


def total(*args, remat, dtype="bfloat16"):
  return step_lib.weighted_sum(*args, model=CONFIG, settings=step_lib.Settings(
      dtype=dtype, remat=remat))


@functools.cache
def lowered(remat):
  """The step's gradient before XLA."""
  return jax.jit(jax.grad(functools.partial(
      total, remat=remat))).lower(*step()).as_text()


def test_no_weight_in_float32():
  text = lowered("named")
  d, f, h, kv = 96, 160, 96, 48
  shapes = [(d, h), (d, kv), (h, d), (d, f), (f, d)]
  for i, o in shapes:
    assert f"tensor<{i}x{o}xf32>" not in text, (i, o)
  # The test would see them: they are there in bfloat16, B below them.
  assert f"tensor<{d + 64}x{f}xbf16>" in text


@pytest.mark.parametrize("remat, times", [("named", 1), ("full", 2)])
def test_norms_are_kept_for_the_backward_pass(remat, times):
  """A^T W of each projection: once, if kept."""
  products = re.findall(
      r"dot_general .*-> tensor<64x\d+xf32>", lowered(remat))
  assert len(products) == 7 * times


@pytest.mark.parametrize("dtype, low", [("bfloat16", 4 * 64), ("float32", 0)])
def test_what_is_kept_of_a_token(dtype, low):
  """Joined or not: the layer's input, the sum of q, k, v, attention's output,
  o_proj's sum, mid, that of gate, up and down_proj's."""
  params, *rest = step()

  def residuals(params):
    return jax.tree.leaves(jax.vjp(
        lambda params: total(params, *rest, remat="named", dtype=dtype),
        params)[1])

  d, f, h, kv = 96, 160, 96, 48
  kept = sum(
      np.prod(x.shape[1:]) / (B * T)
      for x in jax.eval_shape(residuals, params)
      # Of inputs there is one more; see `tape`.
      if x.ndim > 3 and x.shape[1:3] == (B, T)
      and x.shape[0] - CONFIG.n_layers in (0, 1))
  assert kept == d + (h + 2 * kv) + h + d + d + 2 * f + d + low
