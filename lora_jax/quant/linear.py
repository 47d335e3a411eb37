"""`x @ w` for plain and quantised weights."""

from __future__ import annotations

import jax

from lora_jax import types
from lora_jax.quant import base
from lora_jax.quant import fp8


def matmul(
    x: jax.Array, w: types.Array | base.QuantizedArray | fp8.InFloat8
) -> jax.Array:
  """`x [..., i] @ w [i, o]` in `x`'s dtype -> `[..., o]`.

  A quantised weight is frozen: it has no gradient, and the backward pass
  dequantises it again, so that only its codes live between the two passes.
  """
  if isinstance(w, fp8.InFloat8):
    if fp8.applies(x, w):
      return fp8.matmul(x, w.weight, w.recipe)
    w = w.weight
  if isinstance(w, base.QuantizedArray):
    return _frozen_matmul(x, w)
  return x @ w.astype(x.dtype)


@jax.custom_vjp
def _frozen_matmul(x: jax.Array, w: base.QuantizedArray) -> jax.Array:
  return w.matmul(x)


def _forward(
    x: jax.Array, w: base.QuantizedArray
) -> tuple[jax.Array, base.QuantizedArray]:
  return w.matmul(x), w


def _backward(w: base.QuantizedArray, g: jax.Array) -> tuple[jax.Array, None]:
  w, g = w.after(g)
  return w.matmul_transposed(g), None


_frozen_matmul.defvjp(_forward, _backward)
