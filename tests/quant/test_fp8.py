"""Products in 8-bit floats: roundings, products, gradients, and what is saved.

Expected values are numpy's and ml_dtypes', whose 8-bit types round to nearest
even by themselves.
"""

from __future__ import annotations

import operator
import re
import types as python_types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax import quant
from lora_jax.models import config as config_lib
from lora_jax.models import decoder
from lora_jax.models import init
from lora_jax.quant import fp8
from lora_jax.quant import fp8_joint
from lora_jax.train import precision
from lora_jax.train import step
from tests import tiny
from tests.quant import test_linear
from tests.train import test_step

RECIPES = [name for name, recipe in fp8.RECIPES.items() if recipe is not None]
FORMATS = ["none", *quant.FORMATS]
LARGEST = {fp8.E4M3: 448.0, fp8.E5M2: 57344.0}

rounded = jax.jit(fp8.rounded, static_argnums=1)
rounded_weight = jax.jit(fp8.rounded_weight)


def float8(x, dtype, by_token):
  """(float64 values as rounded, scales) of numpy `x`."""
  x = np.float64(x)
  peak = np.abs(x).max(axis=-1 if by_token else None, keepdims=by_token)
  exponent = np.ceil(np.log2(np.maximum(peak, 2.0**-120) / LARGEST[dtype]))
  scale = 2.0 ** np.maximum(exponent, -100)
  return np.float64((x / scale).astype(np.dtype(dtype))), scale


def weight(fmt, rows=64, columns=48, seed=1, dtype=np.float32):
  w = test_linear.normal(rows, columns, seed=seed, scale=0.05).astype(dtype)
  return jnp.asarray(w) if fmt == "none" else quant.quantize(
      w, quant.QuantSpec(fmt, 32))


@pytest.mark.parametrize("how", [
    fp8.Rounding(dtype, by_token) for dtype in LARGEST
    for by_token in (True, False)], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_roundings_are_those_of_ml_dtypes(how, dtype):
  x = test_linear.normal(8, 64) * 2.0 ** np.arange(-8, 8, 2)[:, None]
  x[3] = 0
  x[4, :4] = [448, -448, 17 / 16, 19 / 16]  # Ties, to even.
  x = jnp.asarray(x, dtype)
  got, scale = rounded(x, how)
  want, scales = float8(x, how.dtype, how.by_token)
  np.testing.assert_array_equal(scale, scales)
  np.testing.assert_array_equal(np.float64(got), want)
  assert np.abs(want).max() > LARGEST[how.dtype] / 2


def test_ties_and_the_largest_by_hand():
  x = np.float32([[448, 464, 1 + 1 / 16, 1 + 3 / 16, 2.0**-10, 3 * 2.0**-10]])
  got, scale = rounded(x[:, [0, 2, 3, 4, 5]], fp8.Rounding(fp8.E4M3, True))
  np.testing.assert_array_equal(scale, [[1.0]])
  # Subnormals are multiples of 2^-9: a half rounds to 0, three halves to 2.
  np.testing.assert_array_equal(
      np.float32(got), [[448, 1, 1.25, 0, 2 * 2.0**-9]])
  # 464 is out of range: the scale doubles, and 232 lies between 224 and 240.
  got, scale = rounded(x[:, 1:2], fp8.Rounding(fp8.E4M3, True))
  assert (float(scale[0, 0]), float(got[0, 0])) == (2.0, 224.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name, others", [("fp8", True), ("fp8_tensor", False)])
def test_what_shares_a_scale_that_is_not_finite_is_not_either(
    name, others, bad):
  x = np.ones((2, 16), np.float32)
  x[1, 3] = bad
  w = fp8.InFloat8(weight("none", 16, 16), fp8.RECIPES[name])
  finite = np.isfinite(quant.matmul(jnp.tile(x, (8, 1)), w))
  assert (finite[::2] == others).all() and not finite[1::2].any()
  # By the scale, whatever a backend makes of numbers out of range.
  scale = np.ravel(rounded(x, fp8.RECIPES[name].activation)[1])
  np.testing.assert_array_equal(scale, np.asarray(
      [2.0**-8, np.nan] if others else [np.nan]))


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_weight_is_its_values_rounded_once(fmt):
  w = weight(fmt)
  dense = np.float64(quant.dequantize(w))
  got, scale = rounded_weight(w)
  want = (dense / np.float64(scale)).astype(ml_dtypes.float8_e4m3fn)
  np.testing.assert_array_equal(np.float32(got), np.float32(want))
  # In range, and no more than two bits of it unused.
  assert 448 / 4 < np.abs(dense).max() / float(scale) <= 448
  np.testing.assert_array_equal(
      np.float32(fp8.turned(got)), np.float32(want).T)


@pytest.mark.parametrize("fmt, name", [
    *[(fmt, "fp8") for fmt in FORMATS], ("nf4", "fp8_tensor")])
def test_values_and_gradient(fmt, name):
  w, recipe = weight(fmt), fp8.RECIPES[name]
  x, g = test_linear.normal(2, 8, 64), test_linear.normal(2, 8, 48, seed=2)
  x[1] *= 30

  @jax.jit
  def both(x, w, g):
    y, pull = jax.vjp(
        lambda x: quant.matmul(x, fp8.InFloat8(w, recipe)), x)
    return y, pull(g)[0]

  y, dx = both(x, w, g)
  w8, w_scale = rounded_weight(w)
  w8 = np.float64(w8) * float(w_scale)
  for got, a, how, b in ((y, x, recipe.activation, w8),
                         (dx, g, recipe.gradient, w8.T)):
    a8, scale = float8(a, how.dtype, how.by_token)
    sizes = np.abs(a8 * scale) @ np.abs(b)
    # float32 sums of at most 64 products of 8-bit numbers.
    assert (np.abs(got - (a8 * scale) @ b) <= 64 * 2.0**-24 * sizes).all()
    # The product of the operands before they were rounded is another.
    assert (np.abs(got - np.float64(a) @ b) > 1e-3 * sizes).any()


def test_errors_are_those_of_three_bits():
  """e4m3's relative error is uniform in +-2^-4 / mantissa, 0.0265 in the mean
  square of a normal number: two operands give sqrt(2) times that."""
  w, x = weight("nf4", 512, 256), test_linear.normal(64, 512)
  want = x @ np.asarray(w.dequantize())
  for name in RECIPES:
    got = quant.matmul(jnp.asarray(x), fp8.InFloat8(w, fp8.RECIPES[name]))
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert abs(error - 2**0.5 * 0.0265) < 0.002


@pytest.mark.parametrize("x, w", [
    ((16, 24), (24, 16)), ((16, 32), (32, 24)), ((3, 32), (32, 16))])
def test_other_shapes_are_not_rounded(x, w, caplog):
  x = jnp.asarray(test_linear.normal(*x), jnp.bfloat16)
  w = jnp.asarray(test_linear.normal(*w, seed=1), jnp.bfloat16)
  caplog.set_level("DEBUG")
  got = quant.matmul(x, fp8.InFloat8(w, fp8.RECIPES["fp8"]))
  np.testing.assert_array_equal(got, quant.matmul(x, w))
  assert "no product in 8 bits" in caplog.text


def test_the_largest_products_are_not_rounded(monkeypatch, caplog):
  x, w = jnp.ones((32, 16)), jnp.ones((16, 48))
  marked = fp8.InFloat8(w, fp8.RECIPES["fp8"])
  monkeypatch.setattr(fp8, "MOST", 32 * 48)
  assert fp8.applies(x, marked) and not caplog.records
  monkeypatch.setattr(fp8, "MOST", 32 * 48 - 1)
  assert not fp8.applies(x, marked)
  assert "train.batch_size" in caplog.text


def network(x, stack, recipe, wrap):
  step_ = wrap(lambda x, w: x + jnp.tanh(
      quant.matmul(x, fp8.InFloat8(w, recipe))))
  y, _ = jax.lax.scan(lambda x, w: (step_(x, w), None), x, stack)
  return jnp.sum(y * y)


@pytest.mark.parametrize("remat", [False, True])
def test_no_expanded_weight_is_saved(remat):
  """As `test_linear` has it, of whose plain network the stack is saved."""
  width, layers = test_linear.WIDTH, test_linear.LAYERS
  stack = test_linear.quantised(layers, width, width)
  x = test_linear.normal(16, width)
  wrap = jax.checkpoint if remat else (lambda f: f)

  def f(x, stack):
    return network(x, stack, fp8.RECIPES["fp8"], wrap)

  pull = jax.eval_shape(lambda x: jax.vjp(lambda x: f(x, stack), x)[1], x)
  kept = [leaf for leaf in jax.tree.leaves(pull)
          if jnp.issubdtype(leaf.dtype, jnp.floating)]
  assert max(leaf.size for leaf in kept) < width * width
  compiled = jax.jit(jax.grad(f)).lower(x, stack).compile()
  floats = layers * width * width * 4
  assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * floats


def test_vmap_over_inputs_and_weights():
  stack = test_linear.quantised(2, 64, 48)
  x = jnp.asarray(test_linear.normal(2, 16, 64))

  def one(x, w):
    return quant.matmul(x, fp8.InFloat8(w, fp8.RECIPES["fp8"]))

  got = jax.jit(jax.vmap(one))(x, stack)
  for k in range(2):
    alone = jax.jit(one)(x[k], jax.tree.map(operator.itemgetter(k), stack))
    np.testing.assert_allclose(got[k], alone, rtol=1e-5, atol=1e-5)


CONFIG = config_lib.ModelConfig(
    family="llama", vocab_size=test_step.CONFIG.vocab_size, d_model=32,
    d_ff=48, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16)
BATCH = test_step.fill([[1], [3, 2], [5, 4], [7, 0, 6]], (1, 4))


def model(fmt, method):
  """(base, trainable, frozen)."""
  base = init.random_base(jax.random.key(0), CONFIG)
  if fmt != "none":
    base = base.replace(layers={
        name: one.replace(weight=quant.quantize(
            one.weight, quant.QuantSpec(fmt, 32)))
        if hasattr(one, "weight") else one
        for name, one in base.layers.items()})
  block = adapters_lib.AdapterConfig(method=method, rank=2, alpha=4.0)
  base, tree = adapters_lib.build(
      jax.random.key(1), block, base, tiny.paths(CONFIG))
  if method != "full":
    tree = tiny.random_adapters(CONFIG, base, block, scale=0.1)
  return base, *adapters_lib.split(tree)


def loss_and_grads(parts, name, **options):
  base, params, frozen = parts
  settings = step.Settings(
      **{"remat": "named", "frozen_matmul": name} | options)
  run = jax.jit(lambda *trees: step.loss_and_grads(
      *trees, BATCH, test_step.KEY, model=CONFIG, settings=settings))
  value, grads = run(params, frozen, base)
  return float(value), jax.tree.leaves(grads)


def cosine(ours, theirs):
  product = sum(float((a * b).sum()) for a, b in zip(ours, theirs))
  norms = [sum(float((a * a).sum()) for a in side) for side in (ours, theirs)]
  return product / (norms[0] * norms[1]) ** 0.5


# A program or two for each that is slow, ten seconds.
@pytest.mark.parametrize("fmt, method, full", [
    ("nf4", "lora", False),
    pytest.param("nf4", "lora", True, marks=pytest.mark.slow),
    pytest.param("none", "dora", False, marks=pytest.mark.slow)])
def test_a_training_step_of_packed_rows(fmt, method, full, monkeypatch):
  parts = model(fmt, method)
  # As in bfloat16, and at a greater width.
  monkeypatch.setattr(decoder, "_joins", lambda *unused: method == "lora")
  monkeypatch.setattr(fp8_joint, "MOST", 1.0)
  counts, matmul = [], fp8_joint.matmul
  monkeypatch.setattr(fp8_joint, "matmul", lambda x, weights, *rest: (
      counts.append(len(weights)), matmul(x, weights, *rest))[1])
  want, grads = loss_and_grads(parts, "auto")
  assert not counts
  value, found = loss_and_grads(parts, "fp8")
  assert set(counts) == ({1, 2, 3} if method == "lora" else set())
  assert 1e-6 < abs(value - want) < 0.03
  assert 0.98 < cosine(found, grads) < 0.99999
  if full:
    again, same = loss_and_grads(parts, "fp8", remat="full")
    assert abs(again - value) < 1e-6 and cosine(found, same) > 0.99999


def test_weights_that_are_trained_are_not_rounded():
  parts = model("none", "full")
  base, params, frozen = parts
  values = [step.weighted_sum(
      params, frozen, base, jax.tree.map(lambda x: x[0], BATCH), test_step.KEY,
      model=CONFIG, settings=step.Settings(remat="none", frozen_matmul=name))
            for name in ("auto", "fp8")]
  assert values[0] == values[1]


def device(kind, **fields):
  return python_types.SimpleNamespace(
      device_kind=kind, **{"platform": "gpu"} | fields)


def test_devices_without_8_bits_are_refused():
  for name in RECIPES:
    fp8.check(name, "bfloat16", device("H100", compute_capability="9.0"))
    fp8.check(name, "bfloat16", device("L4", compute_capability="8.9"))
  for other in (device("A100", compute_capability="8.0"), None,
                device("MI300X", compute_capability="gfx942"),
                device("TPU v5e", platform="tpu")):
    kind = other.device_kind if other else "cpu"
    with pytest.raises(errors.UserError, match=rf"8\.9.*{kind}.*=auto"):
      fp8.check("fp8", "bfloat16", other)
    fp8.check("auto", "float32", other)
  h100 = device("H100", compute_capability="9.0")
  with pytest.raises(errors.UsageError, match=r"compute\.dtype=bfloat16"):
    fp8.check("fp8", "float32", h100)
  with pytest.raises(errors.UsageError, match=re.escape('"fp9" is unknown')):
    precision.Precision(frozen_matmul="fp9").validate()


def test_training_all_weights_in_8_bits_is_refused(monkeypatch):
  monkeypatch.setattr(fp8, "check", lambda *unused: None)
  precision.check_frozen_matmul("fp8", "bfloat16", "lora")
  precision.check_frozen_matmul("auto", "bfloat16", "full")
  with pytest.raises(errors.UsageError, match=r"adapter\.method=full"):
    precision.check_frozen_matmul("fp8", "bfloat16", "full")
