"""8-bit products of all projections of one x, low-rank ones among them.

x is rounded once, and what their gradients add to x is one product. Low-rank
products stand beside the frozen ones in the operands, where a few columns of
arithmetic replace passes over activations:

  y_k = [q(x)  h] [q(W_k) ; B_k]                            h   = x [A_1 .. A_n]
  dx  = [q(g_1) .. q(g_n)  d] [q(W_1) .. q(W_n)  A]^T       d_k = g_k B_k^T

(rows of B_k that meet other projections' columns of h are zero). They lose
next to nothing to 8 bits: two e4m3, of 4 significant bits each, hold the 8 of
a bfloat16, and two e5m2 hold 6. So h, B, A and d are rounded to bfloat16, as
in products of their own, and every one is two summands:

  h B = [h' h'' h' h''] [B' ; B' ; B'' ; B'']

A product has one scale for all its operands. Where the low-rank one has bits
of its range to spare, h and B share them; where it needs more, x gives some
of its own: e4m3 are floats, and lose none that count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import types
from lora_jax.quant import fp8

# (A `[i, r]`, B `[r, o]`) float32 of a projection, or None.
Factors = tuple[types.Array, types.Array] | None

# Columns of low-rank operands for each of rank.
TERMS = 4
# Of what is contracted, the share that they may add to a product: a pass over
# an activation takes longer than about this much of its arithmetic.
MOST = 0.25
# Exponents of low-rank operands start here: no value below 2^-60 is of use,
# and sums of exponents stay those of float32.
_LEAST = -60


def together(
    x: types.Array, weights: Sequence[Any], factors: Sequence[Factors]
) -> list[list[int]]:
  """Which projections `matmul` takes, and which of them in one call.

  All at once, or if that is more than a product may be (`fp8.MOST`), each by
  itself; none that `fp8.applies` refuses, or whose rank is large.
  """
  taken = [k for k, w in enumerate(weights)
           if isinstance(w, fp8.InFloat8) and fp8.applies(x, w)]
  tokens = x.size // max(x.shape[-1], 1)

  def fits(group):
    ranks = _rank([factors[k] for k in group])
    inside = x.shape[-1] + TERMS * ranks
    outside = sum(weights[k].shape[1] for k in group) + TERMS * ranks
    return (TERMS * ranks <= MOST * x.shape[-1]
            and tokens * max(inside, outside) <= fp8.MOST)

  if fits(taken):
    return [taken] if taken else []
  return [[k] for k in taken if fits([k])]


def matmul(
    x: types.Array, weights: Sequence[fp8.InFloat8],
    factors: Sequence[Factors],
    keep: Callable[[str, Any], Any] = lambda name, value: value,
) -> list[types.Array]:
  """`x W_k + (x A_k) B_k`, `[..., o_k]` in `x.dtype`, for each k.

  Weights are frozen: they have no gradient, and the backward pass expands
  them again.

  Args:
    x: `[..., i]`, bfloat16 or float32.
    weights: `[i, o_k]`, all of one recipe; see `together`.
    factors: of each.
    keep: is given "low" and x A, and gives it back; see `models.tape`.
  """
  a, h = _downs(factors), None
  if a is not None:
    # Its gradient is part of the others'.
    h = keep("low", jax.lax.stop_gradient(x @ a.astype(x.dtype)))
  return _joint(x, h, tuple(w.weight for w in weights), tuple(factors),
                weights[0].recipe)


def _rank(factors: Sequence[Factors]) -> int:
  """Columns of h: whole units of operands."""
  unit = fp8.UNIT // TERMS
  return -(-sum(f[0].shape[1] for f in factors if f) // unit) * unit


def _downs(factors: Sequence[Factors]) -> jax.Array | None:
  """`[A_1 .. A_n]` with zeros beside, `[i, _rank]`, or None without any."""
  parts = [f[0] for f in factors if f]
  if not parts:
    return None
  a = jnp.concatenate(parts, axis=1)
  return jnp.pad(a, ((0, 0), (0, _rank(factors) - a.shape[1])))


def _ups(factors: Sequence[Factors]) -> list[jax.Array | None]:
  """Each B, `[_rank, o]`, its rows where h has its columns."""
  rank, start = _rank(factors), 0
  found: list[jax.Array | None] = []
  for f in factors:
    if f is None:
      found.append(None)
      continue
    r = f[1].shape[0]
    found.append(jnp.pad(f[1], ((start, rank - start - r), (0, 0))))
    start += r
  return found


def _exponent(scale: jax.Array) -> jax.Array:
  """k of 2^k, int32."""
  return (jax.lax.bitcast_convert_type(scale, jnp.int32) >> 23) - 127


def _two_to(exponent: jax.Array) -> jax.Array:
  bits = (jnp.clip(exponent, -126, 127) + 127) << 23
  return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _scales(peaks, how):
  """(s_x, s_W, s_h, s_B) with s_x s_W = s_h s_B, powers of two.

  Args:
    peaks: largest magnitudes of x, W, h and B; `[]`, or `[..., 1]` of x and h
      `how.by_token`.
    how: rounding of x and h.

  Returns:
    Those of which no operand is out of range, NaN where one is not finite.
  """
  dtypes = (how.dtype, fp8.E4M3, how.dtype, fp8.E4M3)
  x, w, h, b = (_exponent(fp8.power(jnp.where(
      jnp.isfinite(peak), peak, 1.0), dtype)[0])
                for peak, dtype in zip(peaks, dtypes, strict=True))
  h, b = jnp.maximum(h, _LEAST), jnp.maximum(b, _LEAST)
  spare = jnp.max(x) + w - jnp.max(h) - b
  b += jnp.maximum(spare, 0) // 2
  x += jnp.maximum(h - (x + w - b), 0)
  finite = functools.reduce(jnp.logical_and, map(jnp.isfinite, peaks))
  return (jnp.where(finite, _two_to(x), jnp.nan), _two_to(w),
          _two_to(x + w - b), _two_to(b))


def _halves(z: jax.Array, scale: jax.Array, dtype: Any) -> list[jax.Array]:
  """(z', z'') in 8 bits, of which the first has z's leading bits.

  Cut by hand: XLA takes a conversion and its inverse for nothing.
  """
  z = jax.lax.reduce_precision(z.astype(jnp.float32), 8, 7) * (1 / scale)
  mask = -1 << (23 - jnp.finfo(dtype).nmant)
  first = jax.lax.bitcast_convert_type(
      jax.lax.bitcast_convert_type(z, jnp.int32) & mask, jnp.float32)
  return [first.astype(dtype), (z - first).astype(dtype)]


def _left(x: jax.Array, scale: jax.Array, dtype: Any) -> jax.Array:
  return (x.astype(jnp.float32) * (1 / scale)).astype(dtype)


def _operands(xs, h, low, weights, how):
  """Operands of `[q(x_1) .. q(x_n)  h] [q(W) ; low]` and their scales.

  Args:
    xs: what is rounded, as columns; they share a scale.
    h: `[..., r]`, or None.
    low: the other low-rank factors, or None; they share a scale.
    weights: those that share a scale.
    how: rounding of xs and h.

  Returns:
    `[..., n]` in 8 bits, the weights' reciprocal scale, a function that makes
    a low-rank factor `TERMS` operands, and the product's scale.
  """
  largest = lambda parts, how: functools.reduce(
      jnp.maximum, [fp8.largest(part, how) for part in parts])
  x_peak = largest(xs, how)
  w_peak = functools.reduce(jnp.maximum, map(fp8.largest_weight, weights))
  if h is None:
    x_scale, _ = fp8.power(x_peak, how.dtype)
    w_scale, inverse = fp8.power(w_peak, fp8.E4M3)
    beside, split = [], None
  else:
    b_peak = largest(low, fp8.Rounding(fp8.E4M3, False))
    x_scale, w_scale, h_scale, b_scale = _scales(
        (x_peak, w_peak, fp8.largest(h, how), b_peak), how)
    inverse = 1 / w_scale
    beside = _halves(h, h_scale, how.dtype) * (TERMS // 2)

    def split(z):
      first, second = _halves(z, b_scale, fp8.E4M3)
      return [first, first, second, second]

  columns = [_left(x, x_scale, how.dtype) for x in xs] + beside
  left = (columns[0] if len(columns) == 1
          else jnp.concatenate(columns, axis=-1))
  return left, inverse, split, x_scale * w_scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _joint(x, h, weights, factors, recipe):
  return _forward(x, h, weights, factors, recipe)[0]


def _forward(x, h, weights, factors, recipe):
  ups = _ups(factors)
  left, inverse, split, scale = _operands(
      [x], h, [b for b in ups if b is not None], weights, recipe.activation)
  found = []
  for w, b in zip(weights, ups, strict=True):
    right = [fp8.scaled_weight(w, inverse)]
    if split is not None:
      rows = jnp.zeros((_rank(factors), w.shape[1])) if b is None else b
      right += split(rows)
      right = [jnp.concatenate(right)]
    found.append(fp8.product(left, fp8.turned(right[0]), scale, x.dtype))
  return found, (x, h, weights, factors)


def _outer(left, right):
  return jnp.einsum(
      "...i,...o->io", left, right, preferred_element_type=jnp.float32)


def _backward(recipe, residuals, gs):
  x, h, weights, factors = residuals
  a, dtype = _downs(factors), x.dtype
  d = None
  if a is not None:
    d = jnp.concatenate([
        g @ f[1].astype(dtype).T for g, f in zip(gs, factors, strict=True)
        if f], axis=-1)
    beside = a.shape[1] - d.shape[-1]
    if beside:
      d = jnp.pad(d, ((0, 0),) * (d.ndim - 1) + ((0, beside),))
  left, inverse, split, scale = _operands(
      gs, d, [a], weights, recipe.gradient)
  # As in `linear`; behind the rounding, which belongs to what computes g.
  weights, left, inverse = jax.lax.optimization_barrier(
      (weights, left, inverse))
  right = [fp8.scaled_weight(w, inverse) for w in weights]
  if split is not None:
    right += split(a)
  d_x = fp8.product(left, jnp.concatenate(right, axis=1), scale, dtype)
  if d is None:
    return d_x, None, None, tuple(None for _ in factors)
  d_a, start = _outer(x, d), 0
  d_factors: list[Factors] = []
  for g, f in zip(gs, factors, strict=True):
    if f is None:
      d_factors.append(None)
      continue
    stop = start + f[1].shape[0]
    d_factors.append((d_a[:, start:stop], _outer(h[..., start:stop], g)))
    start = stop
  return d_x, None, None, tuple(d_factors)


_joint.defvjp(_forward, _backward)
