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


def longrope(
    rope: config_lib.RopeConfig, head_dim: int, beyond: bool = False
) -> Frequencies:
  """LongRoPE (2402.13753), section 3: a divisor for every frequency.

  `beyond` takes those of sequences longer than the original context.
  """
  divisors = np.asarray(
      rope.long_factor if beyond else rope.short_factor, np.float32)
  inverse = np.float32(1) / (divisors * _base(rope, head_dim))
  if rope.attention_factor is not None:
    scale = rope.attention_factor
  elif rope.factor <= 1:
    scale = 1.0
  else:
    scale = math.sqrt(
        1 + math.log(rope.factor) / math.log(rope.original_max_position))
  return inverse, float(scale)


ROPES: dict[str, Callable[[config_lib.RopeConfig, int], Frequencies]] = {
    "default": default,
    "linear": linear,
    "llama3": llama3,
    "yarn": yarn,
    "longrope": longrope,
}


def tables(
    rope: config_lib.RopeConfig,
    head_dim: int,
    positions: types.Array,
    segment_ids: types.Array | None = None,
    capacity: int | None = None,
) -> tuple[types.Array, types.Array]:
  """Cosines and sines of the rotation.

  LongRoPE rotates a sequence by its length: that of each token's own segment,
  so that it is the same packed or alone. With a cache it goes by the cache's
  capacity: keys that are there already could not be rotated anew when a text
  grows past the original context, and must not be mixed with others.

  Args:
    rope: the variant.
    head_dim: e.
    positions: `[b, t]` int.
    segment_ids: `[b, t]` int, for LongRoPE; None is one segment a row.
    capacity: tokens that a row's cache holds, for LongRoPE; None without one.

  Returns:
    cos, sin: `[b, t, p/2]` float32, with p the rotated dimensions.
  """
  dim = rope.rotary_dim(head_dim)
  inverse, scale = ROPES[rope.type](rope, dim)
  turns: types.Array | np.ndarray = inverse
  if rope.type == "longrope":
    length = (_lengths(jnp.asarray(positions), segment_ids) if capacity is None
              else jnp.asarray(capacity))
    turns = jnp.where((length > rope.original_max_position)[..., None],
                      longrope(rope, dim, beyond=True)[0], inverse)
  angle = positions[..., None].astype(jnp.float32) * turns
  return (jnp.cos(angle) * np.float32(scale),
          jnp.sin(angle) * np.float32(scale))


def _lengths(positions, segment_ids):
  """Tokens of the segment that each token belongs to, `[b, t]` int."""
  if segment_ids is None:
    return positions.max(axis=1, keepdims=True) + 1
  b, t = positions.shape
  rows = jnp.arange(b)[:, None]
  longest = jnp.zeros((b, t + 1), positions.dtype)
  return longest.at[rows, segment_ids].max(positions)[rows, segment_ids] + 1


def rotate(
    x: types.Array, cos: types.Array, sin: types.Array
) -> types.Array:
  """Rotates the pairs (j, j + p/2) of every head's first p dimensions.

  The tables are rounded to `x.dtype` first, as transformers does.

  Args:
    x: `[b, t, n, e]` for n heads.
    cos: `[b, t, p/2]`; p is e unless the rotation is partial.
    sin: `[b, t, p/2]`.

  Returns:
    `[b, t, n, e]`.
  """
  cos = cos.astype(x.dtype)[:, :, None]
  sin = sin.astype(x.dtype)[:, :, None]
  half = cos.shape[-1]
  first, second, rest = jnp.split(x, (half, 2 * half), axis=-1)
  turned = [first * cos - second * sin, second * cos + first * sin]
  return jnp.concatenate(
      turned + ([rest] if rest.shape[-1] else []), axis=-1)
