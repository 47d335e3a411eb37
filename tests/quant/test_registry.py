"""The table of formats and the functions over all of them."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import errors
from lora_jax import quant


def weight(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return np.float32(rng.standard_normal(shape))


def test_the_formats():
  assert set(quant.FORMATS) == {
      "nf4", "fp4", "int4", "int4_affine", "int8", "llm_int8"}
  for name, kind in quant.FORMATS.items():
    got = quant.quantize(weight(64, 4), quant.QuantSpec(name))
    assert type(got) is kind and isinstance(got, quant.QuantizedArray)


def test_none_leaves_the_weight_alone():
  w = jnp.asarray(weight(63, 4))
  assert quant.quantize(w, quant.QuantSpec("none")) is w
  assert quant.dequantize(w, jnp.bfloat16).dtype == jnp.bfloat16
  np.testing.assert_array_equal(quant.dequantize(weight(3, 4)), weight(3, 4))


def test_an_unknown_format_names_the_nearest():
  with pytest.raises(errors.UsageError, match=r'nf5.*did you mean "nf4"'):
    quant.quantize(weight(64, 4), quant.QuantSpec("nf5"))
  with pytest.raises(errors.UsageError, match=r'quant\.format="gptq"'):
    quant.check(quant.QuantSpec("gptq"))
  quant.check(quant.QuantSpec("none"))


@pytest.mark.parametrize("w", [
    np.ones(64, np.float32), np.ones((64, 4), np.int32),
    np.ones((0, 4), np.float32)])
def test_what_is_no_float_matrix_is_refused(w):
  with pytest.raises(errors.UserError, match="cannot be quantised"):
    quant.quantize(w, quant.QuantSpec())


@pytest.mark.parametrize("name", quant.FORMATS)
def test_a_stack_is_its_layers_and_an_outer_jit_changes_nothing(name):
  spec = quant.QuantSpec(name, 32)
  w = weight(3, 96, 20)
  stack = quant.quantize(w, spec)
  layers = [quant.quantize(layer, spec) for layer in w]
  joined = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
  traced = jax.jit(lambda w: quant.quantize(w, spec))(w[0])
  # Codes and absmax are exact; the mean of a batch of layers is summed in
  # another order, so the nested form is compared through its values.
  exact = quant.QuantSpec(name, 32, double=False)
  jax.tree.map(np.testing.assert_array_equal,
               quant.quantize(w, exact),
               jax.tree.map(lambda *leaves: jnp.stack(leaves),
                            *[quant.quantize(layer, exact) for layer in w]))
  np.testing.assert_array_equal(stack.codes, joined.codes)
  np.testing.assert_allclose(
      stack.dequantize(), joined.dequantize(), rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(traced.codes, layers[0].codes)
  np.testing.assert_allclose(
      traced.dequantize(), layers[0].dequantize(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name,nested,bits", [
    ("nf4", True, 4 + 8 / 64 + 32 / 16384), ("nf4", False, 4.5),
    ("int4_affine", False, 5.0), ("int8", False, 8.5)])
def test_bits_per_parameter(name, nested, bits):
  spec = quant.QuantSpec(name, 64, nested)
  tree = {"a": quant.quantize(weight(2, 512, 512), spec),
          "b": {"c": quant.quantize(weight(256, 512), spec)},
          "norm": weight(512)}
  # Beside this only the 32 bits of each offset.
  got = quant.bits_per_parameter(tree)
  assert bits <= got < bits + 4e-4
  assert round(quant.bits_per_parameter(tree), 3) == round(bits, 3)


def test_bits_without_a_quantised_weight():
  assert math.isnan(quant.bits_per_parameter({"norm": weight(4)}))


def test_shapes_can_be_planned_without_weights():
  shape = jax.ShapeDtypeStruct((1024, 4096), jnp.float32)
  planned = jax.eval_shape(
      lambda w: quant.quantize(w, quant.QuantSpec()), shape)
  assert planned.shape == (1024, 4096)
  np.testing.assert_allclose(
      quant.bits_per_parameter(planned), 4.126953125, atol=1e-4)
