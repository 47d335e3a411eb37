"""Products with frozen weights in 8-bit floats, forwards and backwards.

  y  = (q(x) q(W)) s_x s_W        q(z) = z / s, rounded to 8 bits
  dx = (q(g) q(W)^T) s_g s_W      s = the least 2^k with max|z| / s in range

Formats and their use are those of Micikevicius et al. 2022 (arXiv 2209.05433):
e4m3 (3 bits of mantissa, up to 448) for x and W, and for g, which ranges
wider, e4m3 with a scale a token or e5m2 (2 bits, up to 57344) with one. Scales
are taken from what they scale, in the same step. As powers of two they change
no bits of a mantissa: the only roundings are those to 8 bits and that of the
product. The base is frozen: there is no third product, for dW.

W has one scale. Being floats, e4m3 keep their relative precision over 2^15,
and no column of a weight is that much smaller than another. A scale a column
would factor out of y but not of dx.

`fp8_joint` takes projections of one x together, low-rank products with them.

Tensor cores take 8-bit operands whose contracted axis is contiguous: that is
W `[i, o]` as it is for dx, and its transpose for y.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
import dataclasses
import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import errors
from lora_jax import struct
from lora_jax.kernels.attention import base as attention_base
from lora_jax.quant import base

_log = logging.getLogger(__name__)

E4M3 = "float8_e4m3fn"
E5M2 = "float8_e5m2"
# What the tensor cores' operands are multiples of.
UNIT = 16
CAPABILITY = (8, 9)
# Numbers of a result. XLA of jax 0.11.2 has crashed on an H100 on 1.8 times as
# many (16384 x 28672): it cannot be caught, and whoever meets it loses the run.
MOST = 2**28
_MANTISSA = 0x7FFFFF


@dataclasses.dataclass(frozen=True)
class Rounding:
  """To 8 bits: the type, and whether each token `[..., :]` has a scale."""

  dtype: str
  by_token: bool


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How what is multiplied by a weight is rounded."""

  activation: Rounding
  gradient: Rounding


# `compute.frozen_matmul`; None leaves products in `compute.dtype`.
RECIPES: dict[str, Recipe | None] = {
    "auto": None,
    "fp8": Recipe(Rounding(E4M3, True), Rounding(E4M3, True)),
    "fp8_tensor": Recipe(Rounding(E4M3, False), Rounding(E5M2, False)),
}


@struct.dataclass
class InFloat8:
  """A frozen weight, and how products with it are taken.

  Attributes:
    weight: `[i, o]`, an array or a `base.QuantizedArray`.
    recipe: static.
  """

  weight: Any
  recipe: Recipe = struct.field(pytree_node=False)

  @property
  def shape(self) -> tuple[int, ...]:
    return self.weight.shape

  @property
  def ndim(self) -> int:
    return len(self.shape)


def check(name: str, dtype: str, device: Any = None) -> None:
  """Whether a device can compute `compute.frozen_matmul=name`.

  Args:
    name: a key of `RECIPES`.
    dtype: `compute.dtype`.
    device: one of those that will compute it; jax's first by default.

  Raises:
    errors.UsageError: for an unknown name, or a `dtype` without use for it.
    errors.UserError: if the device has no 8-bit floats.
  """
  if errors.choose("compute.frozen_matmul", name, RECIPES) is None:
    return
  if dtype != "bfloat16":
    raise errors.UsageError(
        f"compute.frozen_matmul={name} is for activations in bfloat16, not "
        f"{dtype}; set compute.dtype=bfloat16, or compute.frozen_matmul=auto")
  device = device or jax.devices()[0]
  capability = attention_base.compute_capability(device)
  if capability is None or capability < CAPABILITY:
    raise errors.UserError(
        f"compute.frozen_matmul={name} needs an NVIDIA GPU with 8-bit floats "
        "(Ada, Hopper or later: compute capability 8.9), and this is "
        f"{device.device_kind}; use compute.frozen_matmul=auto")


def marked(
    layer: Mapping[str, Any], name: str, trained: Collection[str] = ()
) -> Mapping[str, Any]:
  """A layer whose weights say that products with them are in 8 bits.

  {"q_proj": Linear(w, b), "norm": n} -> {"q_proj": Linear(InFloat8(w), b), ...}

  Args:
    layer: modules by target; those with a `weight` are projections.
    name: a key of `RECIPES`.
    trained: targets whose weights are not frozen, and stay as they are.
  """
  recipe = RECIPES[name]
  if recipe is None:
    return layer
  return {
      target: module.replace(weight=InFloat8(module.weight, recipe))
      if hasattr(module, "weight") and target not in trained else module
      for target, module in layer.items()}


def applies(x: jax.Array, w: InFloat8) -> bool:
  """Whether `x [..., i] @ w [i, o]` can be taken in 8 bits.

  float16 has no room for the product before it is scaled.
  """
  tokens = x.size // max(x.shape[-1], 1)
  fits = (x.dtype in (jnp.bfloat16, jnp.float32) and x.size > 0
          and not any(n % UNIT for n in (tokens, *w.shape)))
  if not fits:
    _log.debug("%d tokens of %s by a weight %s: no product in 8 bits", tokens,
               x.dtype, list(w.shape))
  elif tokens * max(w.shape) > MOST:
    _log.warning(
        "%d tokens by a weight %s are more than a product in 8 bits may have "
        "(the compiler has crashed on such): in %s; use a smaller "
        "train.batch_size, and train.accumulation", tokens, list(w.shape),
        x.dtype)
    return False
  return fits


def power(peak: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
  """(s, 1 / s): the least power of two with `peak / s` in range.

  NaN where `peak` is not finite, so that the product is not either.
  """
  share = peak * np.float32(1 / float(jnp.finfo(dtype).max))
  bits = jax.lax.bitcast_convert_type(
      jnp.maximum(share, np.float32(2.0**-100)), jnp.int32)
  bits = (bits + _MANTISSA) & ~_MANTISSA
  finite = jnp.isfinite(peak)
  scale, inverse = (
      jnp.where(finite, jax.lax.bitcast_convert_type(b, jnp.float32), jnp.nan)
      for b in (bits, (254 << 23) - bits))
  return scale, inverse


def largest(x: jax.Array, how: Rounding) -> jax.Array:
  """max|x| of all that shares a scale: `[..., 1]` or `[]`, float32."""
  size = jnp.abs(x).astype(jnp.float32)
  return (jnp.max(size, axis=-1, keepdims=True) if how.by_token
          else jnp.max(size))


def rounded(x: jax.Array, how: Rounding) -> tuple[jax.Array, jax.Array]:
  """`x [..., n]` in 8 bits, and its scale: `[..., 1]` or `[]`, float32."""
  scale, inverse = power(largest(x, how), how.dtype)
  return (x.astype(jnp.float32) * inverse).astype(how.dtype), scale


def largest_weight(w: Any) -> jax.Array:
  """`[]` float32: max|w|, or a bound that some blocks of codes reach."""
  if not isinstance(w, base.QuantizedArray):
    return largest(w, Rounding(E4M3, False))
  levels, statistics = w.levels(), w.statistics()
  if levels is None:
    return jnp.max(jnp.abs(w.dequantize(jnp.float32)))
  # Without looking at the codes, which are many more.
  ends = [level * statistics["scales"] + statistics.get("minimums", 0.0)
          for level in (min(levels), max(levels))]
  return jnp.max(jnp.abs(jnp.stack(ends)))


def scaled_weight(w: Any, inverse: jax.Array) -> jax.Array:
  """A weight `[i, o]` times `inverse []`, in e4m3.

  Codes become 8 bits at once, without a wider weight in memory: every format
  is linear in its (floating) statistics, which are scaled instead.
  """
  if not isinstance(w, base.QuantizedArray):
    return (w.astype(jnp.float32) * inverse).astype(E4M3)
  scaled: dict[str, Any] = {
      name: (x * inverse).astype(x.dtype)
      for name, x in w.statistics().items()
      if jnp.issubdtype(x.dtype, jnp.floating)}
  return dataclasses.replace(w, **scaled).dequantize(E4M3)


def rounded_weight(w: Any) -> tuple[jax.Array, jax.Array]:
  """A weight `[i, o]` in e4m3, and its scale `[]`."""
  scale, inverse = power(largest_weight(w), E4M3)
  return scaled_weight(w, inverse), scale


def turned(w: jax.Array) -> jax.Array:
  """`w.T` of 8-bit floats `[i, o]`, moved by words of four rows.

  A transposition of bytes takes XLA longer than the product that it is for.
  """
  rows, columns = w.shape
  raw = jax.lax.bitcast_convert_type(w, jnp.uint8).reshape(-1, 4, columns)
  words = functools.reduce(
      jnp.bitwise_or,
      (raw[:, k].astype(jnp.uint32) << (8 * k) for k in range(4)))
  return jax.lax.bitcast_convert_type(words.T, w.dtype).reshape(columns, rows)


def product(
    x: jax.Array, w: jax.Array, scale: jax.Array, dtype: Any
) -> jax.Array:
  """`x [..., n] @ w [m, n].T` of 8-bit floats times `scale`, in `dtype`."""
  y = jax.lax.dot_general(
      x, w, (((x.ndim - 1,), (1,)), ((), ())),
      precision=jax.lax.Precision.DEFAULT, preferred_element_type=dtype)
  return y * scale.astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: jax.Array, w: Any, recipe: Recipe) -> jax.Array:
  """`x [..., i] @ w [i, o]` in `x`'s dtype -> `[..., o]`, by 8-bit floats.

  Equal roundings of one `x`, as for q, k and v, are one computation to XLA.

  Args:
    x: bfloat16 or float32; see `applies`.
    w: frozen, an array or a `base.QuantizedArray`: it has no gradient, and
      the backward pass expands it again.
    recipe: how `x` and the gradient are rounded.
  """
  x8, x_scale = rounded(x, recipe.activation)
  w8, w_scale = rounded_weight(w)
  return product(x8, turned(w8), x_scale * w_scale, x.dtype)


def _forward(x, w, recipe):
  return matmul(x, w, recipe), w


def _backward(recipe, w, g):
  dtype = g.dtype
  g8, g_scale = rounded(g, recipe.gradient)
  # As in `linear`; behind the rounding, which belongs to what computes g.
  w, g8, g_scale = jax.lax.optimization_barrier((w, g8, g_scale))
  w8, w_scale = rounded_weight(w)
  return product(g8, w8, g_scale * w_scale, dtype), None


matmul.defvjp(_forward, _backward)
