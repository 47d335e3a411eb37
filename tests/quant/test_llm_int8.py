"""LLM.int8 weights against bitsandbytes' functions, and by hand."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import quant

SPEC = quant.QuantSpec("llm_int8", 64, True)


def test_by_hand():
  w = np.float32([[127.0, 0.0], [-63.5, 0.0], [0.6, 0.0]])
  got = quant.quantize(w, SPEC)
  # -63.5 is a tie, which goes to the even -64.
  np.testing.assert_array_equal(got.codes, [[127, 0], [-64, 0], [1, 0]])
  np.testing.assert_array_equal(got.scales, [[127.0, 0.0]])
  np.testing.assert_allclose(
      got.dequantize(), [[127, 0], [-64, 0], [1, 0]], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_codes_scales_and_values_equal_bitsandbytes(dtype):
  torch = pytest.importorskip("torch")
  functional = pytest.importorskip("bitsandbytes.functional")
  rng = np.random.default_rng(0)
  w = np.float32(rng.standard_normal((513, 700)) * rng.uniform(0.01, 9, 700))
  source = torch.from_numpy(w.T.copy()).to(getattr(torch, dtype))
  codes, absmax, _ = functional.int8_vectorwise_quant(source)
  got = quant.quantize(jnp.asarray(w).astype(dtype), SPEC)
  np.testing.assert_array_equal(got.codes, codes.numpy().T)
  np.testing.assert_array_equal(got.scales[0], absmax.numpy())
  np.testing.assert_array_equal(
      got.dequantize(),
      functional.int8_vectorwise_dequant(codes, absmax).numpy().T)
