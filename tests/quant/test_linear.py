"""`matmul`: values, gradients, transformations, and what is not saved."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import quant

LAYERS, WIDTH = 8, 256


def normal(*shape, seed=0, scale=1.0):
  rng = np.random.default_rng(seed)
  return np.float32(scale * rng.standard_normal(shape))


def quantised(*shape, name="nf4", nested=True, seed=1):
  spec = quant.QuantSpec(name, 64, nested)
  return quant.quantize(normal(*shape, seed=seed, scale=0.05), spec)


@pytest.mark.parametrize("name", quant.FORMATS)
@pytest.mark.parametrize("nested", [False, True])
def test_values_and_gradient(name, nested):
  w = quantised(128, 32, name=name, nested=nested)
  dense = np.asarray(w.dequantize())
  x, g = normal(6, 128), normal(6, 32, seed=2)

  @jax.jit
  def both(x, w, g):
    y, pull = jax.vjp(lambda x: quant.matmul(x, w), x)
    return y, pull(g)[0]

  y, dx = both(x, w, g)
  np.testing.assert_allclose(y, x @ dense, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(dx, g @ dense.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 1, 3)])
def test_leading_axes(lead):
  w = quantised(64, 16)
  x = normal(*lead, 64)
  y, pull = jax.vjp(lambda x: quant.matmul(x, w), x)
  np.testing.assert_allclose(y, x @ np.asarray(w.dequantize()), atol=1e-5)
  assert pull(y)[0].shape == x.shape


def test_a_plain_weight_is_cast_and_has_a_gradient():
  x, w = normal(3, 8).astype(jnp.bfloat16), normal(8, 4, seed=1)
  y = quant.matmul(jnp.asarray(x), jnp.asarray(w))
  assert y.dtype == jnp.bfloat16
  np.testing.assert_array_equal(y, jnp.asarray(x) @ w.astype(jnp.bfloat16))
  grad = jax.grad(lambda w: quant.matmul(jnp.ones((1, 8)), w).sum())(w)
  np.testing.assert_array_equal(grad, np.ones((8, 4)))


def test_bfloat16_goes_through():
  w = quantised(64, 16)
  x = jnp.asarray(normal(5, 64), jnp.bfloat16)
  y, pull = jax.vjp(lambda x: quant.matmul(x, w), x)
  assert y.dtype == pull(y)[0].dtype == jnp.bfloat16
  expected = np.asarray(x, np.float32) @ np.asarray(
      w.dequantize(jnp.bfloat16), np.float32)
  # One rounding to 8 bits of a sum of order 1.
  np.testing.assert_allclose(np.asarray(y, np.float32), expected,
                             rtol=2**-7, atol=2**-9)


def test_a_quantised_weight_has_no_gradient():
  w = quantised(64, 16, nested=False)

  def loss(scales):
    return quant.matmul(jnp.ones((2, 64)), w.replace(scales=scales)).sum()

  np.testing.assert_array_equal(jax.grad(loss)(w.scales), 0.0)


def test_vmap_over_inputs_and_over_weights():
  stack = quantised(3, 64, 16)
  x = normal(3, 5, 64)
  dense = np.asarray(stack.dequantize())

  def step(x, w):
    return quant.matmul(x, w).sum()

  grad = jax.jit(jax.vmap(jax.value_and_grad(step)))
  value, dx = grad(x, stack)
  np.testing.assert_allclose(
      value, np.einsum("lti,lio->l", x, dense), rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(
      dx, np.broadcast_to(dense.sum(2)[:, None], x.shape), atol=1e-5)
  one = jax.tree.map(lambda leaf: leaf[0], stack)
  many = jax.vmap(quant.matmul, in_axes=(0, None))(x, one)
  np.testing.assert_allclose(many, x @ dense[0], atol=1e-5)


def network(x, stack, wrap):
  step = wrap(lambda x, w: x + jnp.tanh(quant.matmul(x, w)))
  y, _ = jax.lax.scan(lambda x, w: (step(x, w), None), x, stack)
  return jnp.sum(y * y)


@pytest.mark.parametrize("remat", [False, True])
def test_scan_with_and_without_checkpoint(remat):
  stack, x = quantised(LAYERS, WIDTH, WIDTH), normal(2, WIDTH)
  dense = stack.dequantize()
  wrap = jax.checkpoint if remat else (lambda f: f)
  grad = jax.jit(jax.grad(lambda x, s: network(x, s, wrap)))(x, stack)

  def loop(x):
    for w in dense:
      x = x + jnp.tanh(x @ w)
    return jnp.sum(x * x)

  np.testing.assert_allclose(
      grad, jax.jit(jax.grad(loop))(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("remat", [False, True])
def test_no_dequantised_weight_is_saved(remat):
  """Neither among the residuals nor in the compiled program's memory.

  The same network with a plain dequantise-then-dot does save the stack, so
  the measurement sees what it claims to see.
  """
  stack, x = quantised(LAYERS, WIDTH, WIDTH), normal(2, WIDTH)
  floats = LAYERS * WIDTH * WIDTH * 4

  def residuals(f):
    pull = jax.eval_shape(lambda x: jax.vjp(f, x)[1], x)
    return max(leaf.size for leaf in jax.tree.leaves(pull)
               if jnp.issubdtype(leaf.dtype, jnp.floating))

  def temporaries(f):
    compiled = jax.jit(jax.grad(f)).lower(x, stack).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  wrap = jax.checkpoint if remat else (lambda f: f)

  def ours(x, stack):
    return network(x, stack, wrap)

  assert residuals(lambda x: ours(x, stack)) < WIDTH * WIDTH
  assert temporaries(ours) < 0.5 * floats

  def naive(x, stack):
    def step(x, w):
      return x + jnp.tanh(x @ w.dequantize(x.dtype)), None

    return jnp.sum(jax.lax.scan(step, x, stack)[0] ** 2)

  assert residuals(lambda x: naive(x, stack)) >= LAYERS * WIDTH * WIDTH
  assert temporaries(naive) > floats
