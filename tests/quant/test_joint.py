"""`x W + (x A) B` in one product."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import quant
from lora_jax.kernels import dequantise
from lora_jax.quant import linear

I, OUTS, RANKS = 64, (48, 32, 80), (6, 0, 3)


def operands(formats, block_size=32):
  keys = iter(jax.random.split(jax.random.key(0), 12))
  weights = []
  for fmt, out in zip(formats, OUTS, strict=True):
    w = jax.random.normal(next(keys), (I, out)) / 8
    weights.append(w if fmt == "none" else quant.quantize(
        w, quant.QuantSpec(fmt, block_size)))
  x = jax.random.normal(next(keys), (2, 5, I))
  factors = [(jax.random.normal(next(keys), (I, r)) / 8,
              jax.random.normal(next(keys), (r, out)) / 3)
             for r, out in zip(RANKS, OUTS, strict=True)]
  return x, weights, factors


def reference(x, weights, factors):
  dot = functools.partial(jnp.matmul, precision="highest")
  return [dot(x, quant.dequantize(w)) + dot(dot(x, a), b)
          for w, (a, b) in zip(weights, factors, strict=True)]


def products(*operands):
  return [y for y, _ in quant.joint_matmul(*operands)]


@pytest.mark.parametrize("formats", [
    ("nf4",) * 3, ("int4_affine",) * 3, ("int8",) * 3, ("none",) * 3,
    ("nf4", "none", "int4")])
def test_value_and_gradients(formats):
  x, weights, factors = operands(formats)

  def loss(f):
    def total(x, factors):
      y = jnp.concatenate(f(x, weights, factors), axis=-1)
      return jnp.sum(jnp.sin(y)), y
    with jax.default_matmul_precision("highest"):
      return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(
          x, factors)

  (_, got), grads = loss(products)
  (_, want), expected = loss(reference)
  np.testing.assert_allclose(got, want, atol=1e-5)
  for one, other in zip(
      jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
    if other.size:
      scale = float(jnp.abs(other).max())
      assert float(jnp.abs(one - other).max()) / scale < 1e-5


def test_16_bits_round_once():
  """One rounding of the sum, where two products round each and their sum."""
  x, weights, factors = operands(("nf4",) * 3)
  low = x.astype(jnp.bfloat16)
  got = products(low, weights, factors)[0]
  assert got.dtype == jnp.bfloat16
  exact = reference(low.astype(jnp.float32), weights, factors)[0]
  a, b = (f.astype(jnp.bfloat16) for f in factors[0])
  apart = linear.matmul(low, weights[0]) + (low @ a) @ b
  error = lambda y: float(jnp.abs(y.astype(jnp.float32) - exact).mean())
  assert error(got) < error(apart)
  assert error(got) < 2**-8 * float(jnp.abs(exact).mean())


def test_only_codes_and_low_rank_values_are_kept():
  x, weights, factors = operands(("nf4",) * 3)
  _, pull = jax.vjp(
      lambda x, factors: products(x, weights, factors), x, factors)
  largest = max(leaf.size for leaf in jax.tree.leaves(pull)
                if jnp.issubdtype(leaf.dtype, jnp.floating))
  assert largest < I * min(OUTS)


def test_rows_below_a_weight_stand_in_its_buffer():
  weight = operands(("nf4",) * 3)[1][0]
  more = jnp.full((3, OUTS[0]), 7.0)
  got = weight.dequantize(jnp.float32, below=more)
  np.testing.assert_array_equal(got[:I], weight.dequantize())
  np.testing.assert_array_equal(got[I:], more)
  kernel = dequantise.dequantise(
      jnp.tile(weight.codes, (8, 8)),
      {"scales": jnp.ones((16, 8 * OUTS[0]))}, _form(weight), below=jnp.tile(
          more, (1, 8)), backend="mosaic_tpu", interpret=True)
  plain = dequantise.dequantise(
      jnp.tile(weight.codes, (8, 8)),
      {"scales": jnp.ones((16, 8 * OUTS[0]))}, _form(weight), below=jnp.tile(
          more, (1, 8)), backend="xla")
  np.testing.assert_array_equal(kernel, plain)


def _form(weight):
  from lora_jax.kernels import plain
  return plain.Format(
      weight.decode, weight.block_size, 2, weight.levels())


@pytest.mark.parametrize("own", [False, True])
def test_members_share_what_is_dequantised(own):
  """Under `vmap`: what each has alone, and one dequantisation for all."""
  x, weights, factors = operands(("nf4", "none", "int4"))
  many = lambda tree: jax.tree.map(
      lambda y: jnp.stack([y, 2 * y, y[..., ::-1]]), tree)
  xs, factors = many(x), many(factors)
  given = weights
  if own:
    given = jax.tree.map(lambda y: jnp.stack([y] * 3), weights)
  axes = (0, 0 if own else None, 0)

  def grads(x, weights, factors):
    return jax.grad(lambda x, factors: sum(
        jnp.sum(jnp.sin(y)) for y in products(x, weights, factors)), (0, 1))(
            x, factors)

  got = jax.jit(jax.vmap(grads, axes))(xs, given, factors)
  pick = lambda tree, i: jax.tree.map(lambda y: y[i], tree)
  for i in range(3):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        pick(got, i), jax.jit(grads)(xs[i], weights, pick(factors, i)))


def test_members_dequantise_once(monkeypatch):
  """A weight that all share is not made with each member's rows below."""
  x, weights, factors = operands(("nf4",) * 3)
  seen = []
  dequantize = quant.QuantizedArray.dequantize

  def noted(self, dtype=jnp.float32, below=None):
    seen.append(below)
    return dequantize(self, dtype, below)

  monkeypatch.setattr(quant.QuantizedArray, "dequantize", noted)
  many = jax.tree.map(lambda y: jnp.stack([y, 2 * y]), factors)
  jax.make_jaxpr(lambda x, factors: products(x, weights, factors))(x, factors)
  assert not any(below is None for below in seen)
  jax.make_jaxpr(jax.vmap(
      lambda x, factors: products(x, weights, factors), (None, 0)))(x, many)
  assert sum(below is None for below in seen) == len(weights)
