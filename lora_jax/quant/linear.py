"""`x @ w` for plain and quantised weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import types
from lora_jax.quant import base
from lora_jax.quant import fp8
from lora_jax.quant import registry

Weight = types.Array | base.QuantizedArray | fp8.InFloat8 | base.Computed


def matmul(x: jax.Array, w: Weight) -> jax.Array:
  """`x [..., i] @ w [i, o]` in `x`'s dtype -> `[..., o]`.

  A quantised weight is frozen: it has no gradient, and the backward pass
  dequantises it again, so that only its codes live between the two passes.
  """
  if isinstance(w, base.Computed):
    return w.matmul(x)
  if isinstance(w, fp8.InFloat8):
    if fp8.applies(x, w):
      return fp8.matmul(x, w.weight, w.recipe)
    w = w.weight
  if isinstance(w, base.QuantizedArray):
    return _frozen_matmul(x, w)
  return x @ w.astype(x.dtype)


def take(table: types.Array | base.Computed, rows: types.Array) -> jax.Array:
  """Rows `[..., o]` of a table `[i, o]`, for `rows [...]`."""
  if isinstance(table, base.Computed):
    return table.take(rows)
  return jnp.take(table, rows, axis=0)


def cross(
    a: types.Array, w: Weight, dtype: Any = jnp.float32) -> jax.Array:
  """`a [i, r]` transposed times `w [i, o]`, `[r, o]` float32.

  The operands are rounded to `dtype`, the sums are not; there is no gradient.
  """
  a, w = jax.lax.stop_gradient((a, w))
  return jnp.matmul(
      a.T.astype(dtype), registry.dequantize(w, dtype), precision="highest",
      preferred_element_type=jnp.float32)


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
