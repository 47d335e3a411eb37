"""What an H100 is given to do for products in 8 bits; compiled, not run.

Triton is turned off so that products show as what they are; with it they are
fusions, of which a GPU takes the fastest.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest

from lora_jax import quant
from lora_jax.models import layers
from lora_jax.quant import fp8
from tests.kernels import topologies

T, I, O = 256, 128, 192


@pytest.mark.parametrize("name", ["fp8", "fp8_tensor"])
def test_products_are_in_8_bits_and_roundings_shared(name):
  if reason := topologies.missing("h100"):
    pytest.skip(reason)
  place = jax.sharding.SingleDeviceSharding(topologies.devices("h100")[0])

  def described(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=place), tree)

  w = jax.eval_shape(lambda: quant.quantize(
      jnp.zeros((I, O)), quant.QuantSpec("nf4")))
  recipe = fp8.RECIPES[name]

  def mlp(hidden, gate, up):
    """A norm and two projections of it, as in `decoder.layer`."""
    x = layers.rms_norm(hidden, jnp.ones(I, hidden.dtype), 1e-6)
    first, second = (
        quant.matmul(x, fp8.InFloat8(w, recipe)) for w in (gate, up))
    return jnp.sum(jax.nn.silu(first) * second)

  compiled = jax.jit(jax.value_and_grad(mlp)).lower(*described(
      (jax.ShapeDtypeStruct((T, I), jnp.bfloat16), w, w))).compile(
          compiler_options={"xla_gpu_autotune_level": 0,
                            "xla_gpu_enable_triton_gemm": False})
  text = compiled.as_text()
  # One of two merged products forwards, or both; two backwards.
  calls = text.count('custom_call_target="__cublas$lt$matmul$f8"')
  assert calls in (3, 4)
  assert 'custom_call_target="__cublas$lt$matmul"' not in text
  # In memory, that is, of the entry computation.
  kept = re.findall(
      r"^  (?:ROOT )?%\S+ = \(?(\w+)\[([\d,]+)\]\S* fusion",
      text[text.index("\nENTRY"):], re.M)
  # The activation is rounded once for both, and no weight gets wider.
  assert kept.count(("f8e4m3fn", f"{T},{I}")) == 1
  for dims in (f"{I},{O}", f"{O},{I}", f"{I // 64},64,{O}"):
    assert not {("bf16", dims), ("f32", dims)} & set(kept)
