"""The formats by name, and the functions that take any of them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import errors
from lora_jax import trees
from lora_jax import types
from lora_jax.quant import base
from lora_jax.quant import double
from lora_jax.quant import fp4
from lora_jax.quant import fp8
from lora_jax.quant import int4
from lora_jax.quant import int8
from lora_jax.quant import llm_int8
from lora_jax.quant import nf4

FORMATS: dict[str, type[base.QuantizedArray]] = {
    "nf4": nf4.NF4,
    "fp4": fp4.FP4,
    "int4": int4.Int4,
    "int4_affine": int4.Int4Affine,
    "int8": int8.Int8,
    "llm_int8": llm_int8.LLMInt8,
}


def check(spec: base.QuantSpec) -> None:
  """Raises `errors.UsageError` if `spec` names no format and not `"none"`."""
  errors.choose("quant.format", spec.format, {**FORMATS, "none": None})


def spec_of(w: base.QuantizedArray) -> base.QuantSpec:
  """The spec that quantises another weight as `w` is.

  Raises:
    errors.UserError: if `w` is of a type that is read, but not made.
  """
  for name, kind in FORMATS.items():
    if type(w) is kind:
      return base.QuantSpec(name, w.block_size, isinstance(
          w.scales, double.Nested))
  raise errors.UserError(
      f"weights of type {type(w).__name__} cannot be made from others; load "
      f"the model with quant.format={'|'.join(FORMATS)}")


def quantize(
    w: types.Array, spec: base.QuantSpec
) -> jax.Array | base.QuantizedArray:
  """Quantises a weight; compiled once for every shape, dtype and spec.

  A NaN or an infinity makes its whole block NaN (with `double`, the weight).

  Args:
    w: float `[i, o]`, or with leading axes.
    spec: how. `format="none"` returns `w` as it is.

  Returns:
    The quantised weight, on `w`'s device.

  Raises:
    errors.UserError: for an unknown format, an odd `i` in a 4-bit format, or a
      `w` that is not a float matrix.
  """
  check(spec)
  w = jnp.asarray(w)
  if spec.format == "none":
    return w
  if w.ndim < 2 or not w.size or not jnp.issubdtype(w.dtype, jnp.floating):
    raise errors.UserError(
        f"a weight of shape {list(w.shape)} and type {w.dtype} cannot be "
        "quantised; give a float matrix [in, out]")
  return _quantize(w, spec)


@functools.partial(jax.jit, static_argnames="spec")
def _quantize(w: jax.Array, spec: base.QuantSpec) -> base.QuantizedArray:
  one = functools.partial(FORMATS[spec.format].quantize, spec=spec)
  for _ in range(w.ndim - 2):
    one = jax.vmap(one)
  return one(w)


def dequantize(
    w: types.Array | base.QuantizedArray | fp8.InFloat8 | base.Computed,
    dtype: Any = jnp.float32,
) -> jax.Array:
  """The weight `[..., i, o]` in `dtype`, of a plain or a quantised array."""
  if isinstance(w, base.Computed):
    return w.dequantize(dtype)
  if isinstance(w, fp8.InFloat8):
    w = w.weight
  if isinstance(w, base.QuantizedArray):
    return w.dequantize(dtype)
  return jnp.asarray(w).astype(dtype)


def bits_per_parameter(tree: types.Tree) -> float:
  """Bits stored per parameter, over the quantised weights of `tree`.

  NF4 in blocks of 64 with double quantisation: 4 + 8/64 + 32/(64 * 256) =
  4.127. Plain arrays do not count; without a quantised weight it is NaN.
  """

  def is_weight(x: Any) -> bool:
    return isinstance(x, base.QuantizedArray)

  weights = [
      x for x in jax.tree.leaves(tree, is_leaf=is_weight) if is_weight(x)]
  parameters = sum(trees.size(w.codes) * w.CODES_PER_BYTE for w in weights)
  return 8 * trees.nbytes(weights) / parameters if parameters else float("nan")
