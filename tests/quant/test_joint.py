"""`x [W_1 .. W_n] + (x A) B` in one product."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import quant
from lora_jax.kernels import dequantise
from lora_jax.quant import linear

I, OUTS, R = 64, (48, 32, 80), 6


def operands(formats, block_size=32):
  keys = iter(jax.random.split(jax.random.key(0), 9))
  weights = []
  for fmt, out in zip(formats, OUTS, strict=True):
    w = jax.random.normal(next(keys), (I, out)) / 8
    weights.append(w if fmt == "none" else quant.quantize(
        w, quant.QuantSpec(fmt, block_size)))
  x = jax.random.normal(next(keys), (2, 5, I))
  a = jax.random.normal(next(keys), (I, R)) / 8
  b = jax.random.normal(next(keys), (R, sum(OUTS))) / 3
  return x, weights, a, b


def reference(x, weights, a, b):
  whole = jnp.concatenate([quant.dequantize(w) for w in weights], axis=1)
  return (jnp.matmul(x, whole, precision="highest")
          + jnp.matmul(jnp.matmul(x, a, precision="highest"), b,
                       precision="highest"))


@pytest.mark.parametrize("formats", [
    ("nf4",) * 3, ("int4_affine",) * 3, ("int8",) * 3, ("none",) * 3,
    ("nf4", "none", "int4")])
def test_value_and_gradients(formats):
  x, weights, a, b = operands(formats)

  def loss(f):
    def total(x, a, b):
      y = f(x, weights, a, b)
      return jnp.sum(jnp.sin(y)), y
    with jax.default_matmul_precision("highest"):
      return jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(
          x, a, b)

  (_, got), grads = loss(quant.joint_matmul)
  (_, want), expected = loss(reference)
  np.testing.assert_allclose(got, want, atol=1e-5)
  for one, other in zip(grads, expected, strict=True):
    scale = float(jnp.abs(other).max())
    assert float(jnp.abs(one - other).max()) / scale < 1e-5


def test_16_bits_round_once():
  """One rounding of the sum, where two products round each and their sum."""
  x, weights, a, b = operands(("nf4",) * 3)
  low = x.astype(jnp.bfloat16)
  got = quant.joint_matmul(low, weights, a, b)
  assert got.dtype == jnp.bfloat16
  exact = reference(low.astype(jnp.float32), weights, a, b)
  apart = jnp.concatenate([linear.matmul(low, w) for w in weights], -1) + (
      low @ a.astype(jnp.bfloat16)) @ b.astype(jnp.bfloat16)
  error = lambda y: float(jnp.abs(y.astype(jnp.float32) - exact).mean())
  assert error(got) < error(apart)
  assert error(got) < 2**-8 * float(jnp.abs(exact).mean())


def test_only_codes_and_low_rank_values_are_kept():
  x, weights, a, b = operands(("nf4",) * 3)
  _, pull = jax.vjp(
      lambda x, a, b: quant.joint_matmul(x, weights, a, b), x, a, b)
  largest = max(leaf.size for leaf in jax.tree.leaves(pull)
                if jnp.issubdtype(leaf.dtype, jnp.floating))
  assert largest < I * sum(OUTS)


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


def test_columns_of_several_are_joined_before_decoding():
  _, weights, _, _ = operands(("nf4",) * 3)
  whole = type(weights[0]).joined(weights)
  np.testing.assert_array_equal(
      whole.dequantize(),
      jnp.concatenate([w.dequantize() for w in weights], axis=1))
