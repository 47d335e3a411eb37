"""Rotary position embedding and its length extensions.

Source: Su et al. 2021 (2104.09864), equation 34, in the half-split layout of
Hugging Face; the extensions follow transformers' `modeling_rope_utils`, in
float32 and in its order of operations, since a last-bit difference of a
frequency is multiplied by the position.
"""

from __future__ import annotations

from collections.abc import Callable
import math

import jax.numpy as jnp
import numpy as np

from lora_jax import types
from lora_jax.models import config as config_lib

Frequencies = tuple[np.ndarray, float]


def _base(rope: config_lib.RopeConfig, head_dim: int) -> np.ndarray:
  steps = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
  return np.float32(rope.theta) ** steps


def default(rope: config_lib.RopeConfig, head_dim: int) -> Frequencies:
  """theta^(-2j/e)."""
  return np.float32(1) / _base(rope, head_dim), 1.0


def linear(rope: config_lib.RopeConfig, head_dim: int) -> Frequencies:
  """Position interpolation (2306.15595): every frequency over `factor`."""
  inverse, scale = default(rope, head_dim)
  return inverse / np.float32(rope.factor), scale


def llama3(rope: config_lib.RopeConfig, head_dim: int) -> Frequencies:
  """Llama 3.1: slow dimensions interpolated, fast ones kept, a ramp between.

  A dimension is slow if it turns less than `low_freq_factor` times within
  the original context, fast if more than `high_freq_factor` times.
  """
  inverse, scale = default(rope, head_dim)
  length, factor = rope.original_max_position, np.float32(rope.factor)
  wavelength = np.float32(2 * math.pi) / inverse
  slow = wavelength > length / rope.low_freq_factor
  fast = wavelength < length / rope.high_freq_factor
  ramp = ((np.float32(length) / wavelength - np.float32(rope.low_freq_factor))
          / np.float32(rope.high_freq_factor - rope.low_freq_factor))
  smooth = (1 - ramp) * inverse / factor + ramp * inverse
  scaled = np.where(slow, inverse / factor, inverse)
  return np.where(slow | fast, scaled, smooth).astype(np.float32), scale


def yarn(rope: config_lib.RopeConfig, head_dim: int) -> Frequencies:
  """YaRN (2309.00071), equations 17 to 23: NTK by parts, cos and sin scaled.

  `mscale` and `mscale_all_dim` are DeepSeek's generalisation of equation 22.
  """

  def dimension(turns: float) -> float:
    return (head_dim * math.log(
        rope.original_max_position / (turns * 2 * math.pi))
            / (2 * math.log(rope.theta)))

  def magnitude(mscale: float = 1.0) -> float:
    if rope.factor <= 1:
      return 1.0
    return 0.1 * mscale * math.log(rope.factor) + 1.0

  low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
  if rope.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, head_dim - 1)
  if low == high:
    high += 0.001  # As in transformers: the ramp must not divide by zero.
  ramp = (np.arange(head_dim // 2, dtype=np.float32) - np.float32(low))
  keep = 1 - np.clip(ramp / np.float32(high - low), 0, 1)
  base = _base(rope, head_dim)
  inverse = (np.float32(1) / (np.float32(rope.factor) * base) * (1 - keep)
             + np.float32(1) / base * keep)
  if rope.attention_factor is not None:
    scale = rope.attention_factor
  elif rope.mscale and rope.mscale_all_dim:
    scale = magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
  else:
    scale = magnitude()
  return inverse.astype(np.float32), float(scale)


ROPES: dict[str, Callable[[config_lib.RopeConfig, int], Frequencies]] = {
    "default": default,
    "linear": linear,
    "llama3": llama3,
    "yarn": yarn,
}


def tables(
    rope: config_lib.RopeConfig, head_dim: int, positions: types.Array
) -> tuple[types.Array, types.Array]:
  """Cosines and sines of the rotation.

  Args:
    rope: the variant.
    head_dim: e.
    positions: `[b, t]` int.

  Returns:
    cos, sin: `[b, t, e/2]` float32.
  """
  inverse, scale = ROPES[rope.type](rope, head_dim)
  angle = positions[..., None].astype(jnp.float32) * inverse
  return (jnp.cos(angle) * np.float32(scale),
          jnp.sin(angle) * np.float32(scale))


def rotate(
    x: types.Array, cos: types.Array, sin: types.Array
) -> types.Array:
  """Rotates the pairs (j, j + e/2) of every head.

  The tables are rounded to `x.dtype` first, as transformers does.

  Args:
    x: `[b, t, n, e]` for n heads.
    cos: `[b, t, e/2]`.
    sin: `[b, t, e/2]`.

  Returns:
    `[b, t, n, e]`.
  """
  cos = cos.astype(x.dtype)[:, :, None]
  sin = sin.astype(x.dtype)[:, :, None]
  first, second = jnp.split(x, 2, axis=-1)
  return jnp.concatenate(
      [first * cos - second * sin, second * cos + first * sin], axis=-1)
