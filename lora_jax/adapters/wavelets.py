"""Orthogonal wavelets of one level, on the last axis of an array.

`synthesis` puts coefficients together: of their first half the low-pass
filter h makes a coarse signal, of their second half the high-pass filter
g[k] = (-1)^k h[len - 1 - k] the details,

  y[t] = sum_k h[t + len - 2 - 2 k] a[k] + g[t + len - 2 - 2 k] d[k]

Daubechies' filters db1 (Haar's) to db10 and her least asymmetric ones, sym2 to
sym10, have 2 n taps and n vanishing moments: h is (1 + z)^n times one zero of
each pair {z, 1 / z} of a polynomial, all within the unit circle or, in sym, a
choice of them (Daubechies 1992, Ten Lectures on Wavelets, sections 6.1 and
8.1). coif1 to coif3 are her coiflets (section 8.2).
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import types

# Of sym n: which zeros lie outside of the unit circle, by `_zeros`' order, and
# whether the taps are reversed.
_SYMLETS = {2: ((), False), 3: ((0,), True), 4: ((0,), True),
            5: ((0,), False), 6: ((0, 2), False), 7: ((1, 2), True),
            8: ((1, 3), False), 9: ((1, 2), False), 10: ((1, 3), True)}
_COIFLETS = {
    1: (-0.05142972847076845, 0.23892972847076846, 0.6028594569415369,
        0.2721405430584631, -0.05142972847076845, -0.011070271529231544),
    2: (0.011587596738716868, -0.029320137983468563, -0.04763959031100813,
        0.2730210465347666, 0.5746823938568638, 0.2948671936956192,
        -0.05408560709171143, -0.042026480460771606, 0.016744410163279506,
        0.003967883612962012, -0.0012892033561406595, -0.0005095053991076441),
    3: (-0.0026824186709220686, 0.005503126707831385, 0.016583560479170346,
        -0.046507764478726975, -0.043220763560211914, 0.28650333527364746,
        0.56128525687033, 0.30298357177282415, -0.050770140754888865,
        -0.05819625076158553, 0.024434094321166958, 0.011229240962037866,
        -0.006369601011048823, -0.0018204589155662422, 0.0007902051009575939,
        0.000329665173793183, -5.019277455327665e-05, -2.4465734255308132e-05),
}
NAMES = (*(f"db{n}" for n in range(1, 11)), *(f"sym{n}" for n in _SYMLETS),
         *(f"coif{n}" for n in _COIFLETS))


@functools.cache
def low_pass(name: str) -> np.ndarray:
  """h of one of `NAMES`, of sum sqrt 2 and norm 1."""
  kind = name.rstrip("0123456789")
  n = int(name[len(kind):])
  if kind == "coif":
    return math.sqrt(2) * np.array(_COIFLETS[n])
  outside, backwards = _SYMLETS[n] if kind == "sym" else ((), False)
  taps = np.ones(1, complex)
  for _ in range(n):
    taps = np.convolve(taps, [1, 1])
  for k, zero in enumerate(_zeros(n)):
    zero = 1 / zero if k in outside else zero
    taps = np.convolve(taps, [1, -zero])
    if zero.imag:
      taps = np.convolve(taps, [1, -zero.conjugate()])
  h = taps.real * math.sqrt(2) / taps.real.sum()
  return h[::-1] if backwards else h


def _zeros(n: int) -> list[complex]:
  """Those within the unit circle of sum_k<n C(n-1+k, k) y^k, where y is
  (2 - z - 1/z) / 4; of a conjugate pair the one above the real line."""
  y = np.roots([math.comb(n - 1 + k, k) for k in reversed(range(n))])
  half = (1 - 2 * y).astype(complex)
  z = half - np.sqrt(half * half - 1)
  z = np.where(abs(z) < 1, z, 1 / z)
  z = np.where(abs(z.imag) < 1e-9, z.real, z)
  return sorted((one for one in z if one.imag >= 0), key=abs)


def coefficients(name: str, size: int) -> int:
  """How many coefficients a signal of `size` has, an even number."""
  needed = size + len(low_pass(name)) - 2
  return needed + needed % 2


def synthesis(name: str, x: types.Array, size: int) -> types.Array:
  """The signal `[..., size]` of coefficients.

  Args:
    name: one of `NAMES`.
    x: `[..., coefficients(name, size)]`.
    size: of the signal.
  """
  h = low_pass(name)
  taps = len(h)
  g = h[::-1] * (-1.0) ** np.arange(taps)
  half, pad = x.shape[-1] // 2, taps // 2 - 1
  signs = [(0, 0)] * (x.ndim - 1) + [(pad, pad)]
  parts = [(f, jnp.pad(part, signs)) for f, part in zip(
      (h, g), (x[..., :half], x[..., half:]), strict=True)]

  def phase(odd):
    return sum(
        part[..., pad - m:pad - m + half + pad] * float(f[2 * m + odd])
        for f, part in parts for m in range(taps // 2))

  y = jnp.stack([phase(0), phase(1)], -1)
  y = y.reshape(*x.shape[:-1], 2 * (half + pad))
  return y[..., taps - 2:taps - 2 + size]


def analysis(name: str, x: types.Array) -> types.Array:
  """The transpose of `synthesis`, `[..., coefficients]` of x `[..., size]`."""
  size = x.shape[-1]
  like = jax.ShapeDtypeStruct(
      (*x.shape[:-1], coefficients(name, size)), x.dtype)
  back = jax.linear_transpose(
      functools.partial(synthesis, name, size=size), like)
  return back(x)[0]
