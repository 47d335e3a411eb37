"""Low-rank products beside 8-bit ones, and what shares a rounding.

Expected values are numpy's, of operands rounded by ml_dtypes.
"""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import quant
from lora_jax.adapters import dora
from lora_jax.adapters import lora as lora_lib
from lora_jax.quant import fp8
from lora_jax.quant import fp8_joint
from tests.kernels import topologies
from tests.quant import test_fp8
from tests.quant import test_linear

I, O, R = 64, 48, 3
# Of the larger operands' product: what two 8-bit floats leave of a bfloat16.
LEFT = {fp8.E4M3: 2.0**-12, fp8.E5M2: 2.0**-6}


def bf16(z):
  return np.float64(np.asarray(z, np.float32).astype(ml_dtypes.bfloat16))


def inputs(scale=1.0):
  """x, three weights, factors of the first and the last, gradients."""
  weights = [test_fp8.weight("nf4", I, O, seed=k) for k in range(3)]
  low = [(test_linear.normal(I, r, seed=k, scale=0.1),
          test_linear.normal(r, O, seed=k + 9, scale=scale))
         for k, r in ((0, R), (2, 2 * R))]
  return (test_linear.normal(2, 8, I), weights, [low[0], None, low[1]],
          [test_linear.normal(2, 8, O, seed=k, scale=1e-4)
           for k in (3, 4, 5)])


@functools.partial(jax.jit, static_argnums=4)
def run(x, weights, factors, gs, name):
  """(y, dx, gradients of the factors)."""
  marked = [fp8.InFloat8(w, fp8.RECIPES[name]) for w in weights]
  y, pull = jax.vjp(
      lambda x, factors: fp8_joint.matmul(x, marked, factors), x, factors)
  return y, *pull(gs)


def within(got, wide, low, how):
  """Whether `got` is what its operands say; each a list of pairs of them."""
  sizes = sum(np.abs(a) @ np.abs(b) for a, b in wide + low)
  allowed = I * O * 2.0**-24 * sizes + LEFT[how.dtype] * sum(
      np.abs(a) @ np.abs(b) for a, b in low)
  return np.abs(got - sum(a @ b for a, b in wide + low)) <= allowed


@pytest.mark.parametrize("name", test_fp8.RECIPES)
def test_values_and_gradients(name):
  x, weights, factors, gs = inputs()
  y, dx, d_factors = run(x, weights, factors, gs, name)
  recipe = fp8.RECIPES[name]
  assert recipe is not None
  # One scale for all weights: where it is another's, only the smallest of
  # them (below 2^-9 of it) can be rounded otherwise than by their own.
  peak = max(float(fp8.largest_weight(w)) for w in weights)
  s = 2.0 ** np.ceil(np.log2(peak / 448))
  w8 = [s * np.float64((np.asarray(quant.dequantize(w)) / s).astype(
      ml_dtypes.float8_e4m3fn)) for w in weights]
  x8, x_scale = test_fp8.float8(x, recipe.activation.dtype,
                                recipe.activation.by_token)
  hs = [f and bf16(x @ f[0]) for f in factors]
  for got, w, f, h in zip(y, w8, factors, hs, strict=True):
    low = [(h, bf16(f[1]))] if f else []
    assert within(got, [(x8 * x_scale, w)], low, recipe.activation).all()
  joined = np.concatenate(gs, axis=-1)
  g8, g_scale = test_fp8.float8(joined, recipe.gradient.dtype,
                                recipe.gradient.by_token)
  wide = list(zip(np.split(g8 * g_scale, 3, axis=-1), [w.T for w in w8]))
  low = [(bf16(g @ f[1].T), bf16(f[0]).T)
         for g, f in zip(gs, factors, strict=True) if f]
  assert within(dx, wide, low, recipe.gradient).all()
  # One rounding of a factor to 8 bits is not enough, nor is none of them.
  assert not within(dx, wide, [(test_fp8.float8(a, fp8.E5M2, False)[0]
                                * test_fp8.float8(a, fp8.E5M2, False)[1], b)
                               for a, b in low], recipe.gradient).all()
  assert not within(dx, wide, low[:1], recipe.gradient).any(axis=-1).all()
  for f, g, got in zip(factors, gs, d_factors, strict=True):
    if f is None:
      assert got is None
      continue
    da = np.einsum("bti,btr->ir", x, g @ f[1].T)
    db = np.einsum("btr,bto->ro", x @ f[0], g)
    np.testing.assert_allclose(got[0], da, atol=1e-5 * np.abs(da).max())
    np.testing.assert_allclose(got[1], db, atol=1e-5 * np.abs(db).max())


@pytest.mark.parametrize("scale, off", [
    (1e-5, 0.01), (1e-3, 0.004), (1e3, 0.004), (1e6, 0.004)])
def test_low_rank_products_far_smaller_and_far_larger(scale, off):
  """Whose error bfloat16 has a share of: 2^-9 / sqrt(3) for each factor."""
  x, weights, factors, gs = inputs(scale)
  zero = [f and (f[0], 0 * f[1]) for f in factors]
  y, dx, _ = run(x, weights, factors, gs, "fp8")
  base, dx_base, _ = run(x, weights, zero, gs, "fp8")
  for k in (0, 2):
    low = np.float64(x) @ factors[k][0] @ factors[k][1]
    error = np.linalg.norm(y[k] - low - (0 if scale > 1e3 else base[k]))
    # Larger ones hide what float32 has of the others.
    assert error < off * np.linalg.norm(low)
  low = sum(np.float64(g) @ f[1].T @ f[0].T
            for g, f in zip(gs, factors, strict=True) if f)
  if scale > 1e-4:  # Differences of float32 sums are no longer of use.
    error = np.linalg.norm(dx - low - (0 if scale > 1e3 else dx_base))
    assert error < off * np.linalg.norm(low)


def test_the_scales_of_one_product_agree():
  how = fp8.Rounding(fp8.E4M3, True)
  for exponents in np.random.default_rng(0).integers(-20, 20, (50, 5)):
    x, other, w, h, b = np.float32(2.0) ** exponents
    peaks = (jnp.asarray([[x], [other]]), jnp.asarray(w),
             jnp.asarray([[h], [h / 4]]), jnp.asarray(b))
    s_x, s_w, s_h, s_b = (np.float64(s) for s in fp8_joint._scales(peaks, how))
    np.testing.assert_array_equal(s_x * s_w, s_h * s_b)
    for peak, s in zip(peaks, (s_x, s_w, s_h, s_b), strict=True):
      assert (np.asarray(peak) / s <= 448).all()
      assert (np.log2(s) % 1 == 0).all()
    # Then x is what it would be by itself.
    if other <= x and h * b * 2**8 < x * w:
      np.testing.assert_array_equal(
          s_x[0], fp8.power(peaks[0], fp8.E4M3)[0][0])


@pytest.mark.parametrize("where", ["x", "a", "b"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_shows(where, bad):
  x, weights, factors, gs = inputs()
  (a, b), *others = factors
  {"x": x[0], "a": a, "b": b}[where][0, 1] = bad
  y, dx, _ = run(x, weights, [(a, b), *others], gs, "fp8_tensor")
  assert np.isnan(y[0]).all()
  if where != "x":
    assert np.isnan(dx).all()


def test_what_goes_together(monkeypatch):
  x, weights, factors, _ = inputs()
  marked = [fp8.InFloat8(w, fp8.RECIPES["fp8"]) for w in weights]
  # 4 * 12 columns are too many beside 64, and so are 4 * 8, but not 4 * 4.
  assert fp8_joint.together(x, marked, factors) == [[0], [1]]
  monkeypatch.setattr(fp8_joint, "MOST", 1.0)
  assert fp8_joint.together(x, marked, factors) == [[0, 1, 2]]
  # 16 tokens by 3 * 48 and 4 * 12 columns, or by 64 and 4 * 8 of one.
  monkeypatch.setattr(fp8, "MOST", 16 * (3 * 48 + 4 * 12) - 1)
  assert fp8_joint.together(x, marked, factors) == [[0], [1], [2]]
  monkeypatch.setattr(fp8, "MOST", 16 * (64 + 4 * 8) - 1)
  assert fp8_joint.together(x, marked, factors) == [[0], [1]]
  mixed = [marked[0], weights[1], marked[2]]
  assert fp8_joint.together(x, mixed, factors)[:1] == [[0]]
  assert fp8_joint.together(x[..., :0], mixed, factors) == []


def test_projections_of_one_x_are_those_of_each():
  """LoRA, DoRA, no adapter, and one whose dropout needs an x of its own."""
  x, weights, _, gs = inputs()
  x = jnp.asarray(np.tile(x, (1, 1, 4)), jnp.bfloat16)
  weights = [test_fp8.weight("nf4", 4 * I, O, seed=k) for k in range(4)]
  gs = [jnp.asarray(g, jnp.bfloat16) for g in (*gs, gs[0])]
  one = jnp.float32(1)
  low = [(test_linear.normal(4 * I, R, seed=k, scale=0.1),
          test_linear.normal(R, O, seed=k + 9, scale=0.3)) for k in range(3)]
  drop = adapters_lib.Noise(
      jax.random.key(0), jnp.zeros((2, 8), int), jnp.ones((2, 8), int))

  @functools.partial(jax.jit, static_argnums=2)
  def run(x, low, join):
    marked = [fp8.InFloat8(w, fp8.RECIPES["fp8"]) for w in weights]

    def project(x, low):
      rest = {"scale": one, "rate": one / 2, "rank": jnp.int32(R)}
      made = [lora_lib.LoRA(*low[0], **rest),
              dora.DoRA(*low[1], m=jnp.ones(O), **rest), None,
              lora_lib.LoRA(*low[2], **rest)]
      return adapters_lib.project_all(
          x, marked, made, [None, None, None, drop], join)

    y, pull = jax.vjp(project, x, low)
    return y, pull(gs)

  text = run.lower(x, low, True).as_text()
  # Of W: three and one forwards, one for three and one backwards.
  assert len(re.findall(r"dot_general.*f8E4M3FN>, tensor", text)) == 6
  assert len(re.findall(r"dot_general.*f8E4M3FN>, tensor", run.lower(
      x, low, False).as_text())) == 8
  for got, want in zip(*(jax.tree.leaves(run(x, low, join))
                         for join in (True, False)), strict=True):
    error = np.linalg.norm(np.float64(got) - np.float64(want))
    # bfloat16's, and of scales that are shared.
    assert error < 0.01 * np.linalg.norm(np.float64(want))


T, WIDE = 256, 192


def test_low_rank_products_are_no_passes_of_their_own():
  if reason := topologies.missing("h100"):
    pytest.skip(reason)
  place = jax.sharding.SingleDeviceSharding(topologies.devices("h100")[0])
  recipe = fp8.RECIPES["fp8_tensor"]
  i = 512

  def mlp(x, params, weights):
    adapters = [lora_lib.LoRA(a, b, jnp.float32(2), None, None)
            for a, b in params]
    first, second = adapters_lib.project_all(
        x, [fp8.InFloat8(w, recipe) for w in weights], adapters, [None, None],
        join=True)
    return jnp.sum((jax.nn.silu(first) * second).astype(jnp.float32))

  w = jax.eval_shape(lambda: quant.quantize(
      jnp.zeros((i, WIDE)), quant.QuantSpec("nf4")))
  factors = (jnp.zeros((i, 16)), jnp.zeros((16, WIDE)))
  args = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
      (jnp.zeros((T, i), jnp.bfloat16), [factors, factors], [w, w]))
  text = jax.jit(jax.grad(mlp, (0, 1))).lower(*args).compile(
      compiler_options={"xla_gpu_autotune_level": 0,
                        "xla_gpu_enable_triton_gemm": False}).as_text()
  calls = re.findall(
      r'= \(?(\w+\[[\d,]+\]).* custom_call_target="__cublas([^"]*)"', text)
  eight = [shape for shape, target in calls if target == "$lt$matmul$f8"]
  # Two forwards, which XLA may merge, and one backwards for both.
  assert sorted(eight)[:-1] in (
      [f"bf16[{T},{WIDE}]"] * 2, [f"bf16[{T},{2 * WIDE}]"])
  assert sorted(eight)[-1] == f"bf16[{T},{i}]"
  others = [shape for shape, target in calls if target != "$lt$matmul$f8"]
  assert others and not {f"bf16[{T},{WIDE}]", f"bf16[{T},{i}]"} & set(others)
  # x with what stands beside it, once.
  kept = re.findall(r"^  (?:ROOT )?%\S+ = \(?(f8\w+\[[\d,]+\])\S* fusion",
                    text[text.index("\nENTRY"):], re.M)
  assert kept.count(f"f8e4m3fn[{T},{i + 4 * 32}]") == 1
  assert kept.count(f"f8e5m2[{T},{2 * WIDE + 4 * 32}]") == 1
