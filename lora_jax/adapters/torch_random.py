"""torch's CPU random numbers, drawn with numpy.

Some of PEFT's methods derive frozen values or sets of places from a seed in
adapter_config.json and need not save them: VeRA, PVeRA and RandLoRA their
projections, FourierFT, WaveFT, FRoD and SHiRA a permutation's first entries,
TinyLoRA normal matrices. A `Generator` draws what torch draws on a CPU:

  words      MT19937 (Matsumoto and Nishimura 1998) seeded with the low 32 bits
  uniform    (high - low) (word mod 2^24) / 2^24 + low, one fused multiply-add
  normal     Box-Muller: sqrt(-2 log(1 - u)) (cos 2 pi v, sin 2 pi v)
  randperm   Fisher-Yates; from `LARGE` entries on, inside out

`words` and `randperm` are torch's to the bit. So is `uniform` on a CPU with
AVX2; without fused multiply-adds, torch itself rounds once more. `normal` is
within 1e-6 standard deviations of what torch's vectorised logarithm and cosine
give under AVX2, within 3e-6 of what it computes without.
"""

from __future__ import annotations

from collections.abc import Iterator
import math
from typing import Any

import numpy as np

from lora_jax import errors

# What torch.Generator() holds that nobody has seeded.
UNSEEDED = 67280421310721
# From here on, torch's randperm is another algorithm.
LARGE = (2**32 - 1) // 20
# Words that are drawn at once where not all of them are kept.
BLOCK = 2**22


class Generator:
  """`torch.Generator().manual_seed(seed)`.

  Every draw leaves it where torch's would be, so that the next ones match too.

  Args:
    seed: from -2^63 to 2^64 - 1, as torch allows; its low 32 bits count.

  Raises:
    errors.UserError: if `seed` is no such integer.
  """

  def __init__(self, seed: int = UNSEEDED):
    if (not isinstance(seed, int) or isinstance(seed, bool)
        or not -2**63 <= seed < 2**64):
      raise errors.UserError(
          f"the seed {seed!r} is none that torch takes; write an integer from "
          "-2^63 to 2^64 - 1")
    self._engine = np.random.RandomState(seed % 2**32)
    self._unread = 0
    self._spare: float | None = None

  def words(self, count: int) -> np.ndarray:
    """The next raw words, `[count]` uint32."""
    for block in _blocks(0, self._unread):
      self._draw(len(block))
    self._unread = 0
    return self._draw(count)

  def _draw(self, count: int) -> np.ndarray:
    return self._engine.randint(0, 2**32, size=count, dtype=np.uint32)

  def _words64(self, count: int) -> np.ndarray:
    high, low = self.words(2 * count).reshape(count, 2).T.astype(np.uint64)
    return (high << 32) | low

  def uniform(
      self, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0,
      dtype: Any = np.float32,
  ) -> np.ndarray:
    """`torch.empty(shape, dtype=dtype).uniform_(low, high, generator=self)`.

    Args:
      shape: of the result.
      low: the least value.
      high: above all values.
      dtype: float32, or float16 or bfloat16 as torch >= 2.13 draws them: in
        float32, then rounded. Earlier ones have 11 or 8 random bits instead.
    """
    least, most = np.float32(low), np.float32(high)
    u = (self.words(math.prod(shape)) & (2**24 - 1)) * 2.0**-24
    # In float64 the product is exact, and for bounds +-b so is the sum; what
    # rounds is the cast, as in a fused multiply-add.
    value = u * np.float64(most - least) + np.float64(least)
    value = value.astype(np.float32).astype(dtype)
    # As torch has it, which keeps the bound out where a cast rounds up to it.
    bottom, top = least.astype(dtype), most.astype(dtype)
    return np.where(value == top, bottom, value).reshape(shape)

  def kaiming_uniform(
      self, shape: tuple[int, ...], a: float = 0.0, dtype: Any = np.float32,
  ) -> np.ndarray:
    """`torch.nn.init.kaiming_uniform_(..., a=a)`, U(-b, b) with
    b = sqrt(6 / ((1 + a^2) fan_in)) (He et al. 2015, 1502.01852, eq. 14 with
    the leaky slope a). VeRA's own initialisation is that of a = 0, RandLoRA's
    that of sqrt(5), in bfloat16.

    Args:
      shape: `[o, i, ...]`, of two axes or more; fan_in = i ...
      a: the slope.
      dtype: see `uniform`.
    """
    gain = math.sqrt(2.0 / (1 + a**2))
    bound = math.sqrt(3.0) * (gain / math.sqrt(math.prod(shape[1:])))
    return self.uniform(shape, -bound, bound, dtype)

  def normal(
      self, shape: tuple[int, ...], mean: float = 0.0, std: float = 1.0,
  ) -> np.ndarray:
    """`torch.empty(shape).normal_(mean, std, generator=self)`, float32; what
    torch.randn and torch.normal draw, too."""
    size = math.prod(shape)
    if size < 16:
      draws = np.array([self._one_normal() for _ in range(size)])
      return (draws * std + mean).astype(np.float32).reshape(shape)
    u = self.uniform((size,))
    whole = size - size % 16
    value = np.empty(size, np.float64)
    value[:whole] = _box_muller(u[:whole])
    if whole < size:  # torch draws the last 16 anew, some for a second time.
      value[-16:] = _box_muller(self.uniform((16,)))
    value = value * np.float32(std) + np.float32(mean)
    return value.astype(np.float32).reshape(shape)

  def _one_normal(self) -> float:
    """One draw in float64; draws come in pairs, of which one is put by."""
    if self._spare is not None:
      value, self._spare = self._spare, None
      return value
    v, u = (self._words64(2) & np.uint64(2**53 - 1)) * 2.0**-53
    radius, angle = math.sqrt(-2.0 * math.log1p(-u)), 2.0 * math.pi * v
    self._spare = radius * math.sin(angle)
    return radius * math.cos(angle)

  def randperm(self, n: int, first: int | None = None) -> np.ndarray:
    """`torch.randperm(n, generator=self)[:first]`, int64.

    Below `LARGE`, the time is that of the entries asked for, and words that
    only the others need are drawn when something else is.

    Args:
      n: of how many.
      first: how many entries to return; None: all.

    Raises:
      errors.UserError: if `first` is not from 0 to n.
    """
    k = n if first is None else first
    if not 0 <= k <= n:
      raise errors.UserError(
          f"{k} places of {n} were asked for; ask for at least 0 and at most "
          f"{n}")
    return self._swaps(n, k) if n < LARGE else self._inside_out(n, k)

  def _swaps(self, n: int, k: int) -> np.ndarray:
    """x = 0..n-1; for i < n - 1: x[i] <-> x[p_i], p_i = i + word mod (n - i).

    No later swap moves x[i]. It comes from place p_i, where the last earlier
    swap j with p_j = p_i left what x[j] was; and x[j] was what the last swap
    before j with p = j left there.
    """
    used = min(k, max(n - 1, 0))
    i = np.arange(k)
    p = i.copy()  # The last entry is swapped with itself.
    p[:used] += self.words(used) % (n - i[:used])
    self._unread += max(n - 1, 0) - used
    parent = np.full(k, -1)
    hit = p < k  # Where p_i = i, nothing later comes from i.
    np.maximum.at(parent, p[hit], i[hit])
    root = _roots(np.where(parent < 0, i, parent))
    before = _previous(p)
    return np.where(before < 0, p, root[before])

  def _inside_out(self, n: int, k: int) -> np.ndarray:
    """For i < n: x[i] = x[z_i], x[z_i] = i with z_i = word64 mod (i + 1).

    x[i] is set to the last j < i with z_j = z_i, or else to what x[z_i] was
    set to; then every i overwrites the entry z_i.
    """
    i = np.arange(k)
    z = self._below(i)
    before = _previous(z)
    root = _roots(np.where(before < 0, z, i))
    x = np.where(before < 0, i, before)[root]
    np.maximum.at(x, z, i)
    for block in _blocks(k, n):
      i = np.arange(block.start, block.stop)
      z = self._below(i)
      hit = z < k
      np.maximum.at(x, z[hit], i[hit])
    return x

  def _below(self, i: np.ndarray) -> np.ndarray:
    return (self._words64(len(i)) % (i + 1).astype(np.uint64)).astype(np.int64)


def _blocks(start: int, stop: int) -> Iterator[range]:
  """start..stop-1 in pieces."""
  for at in range(start, stop, BLOCK):
    yield range(at, min(at + BLOCK, stop))


def _box_muller(u: np.ndarray) -> np.ndarray:
  """Normal numbers, float64, of uniform ones `[16 b]` float32: in each group
  of 16, the second eight are the angles of the first eight."""
  radial, angular = np.moveaxis(u.reshape(-1, 2, 8), 1, 0)
  # In float32 where torch's own rounding is known, then as exactly as may be.
  radius = np.sqrt(-2.0 * np.log((np.float32(1) - radial).astype(np.float64)))
  angle = (np.float32(2 * math.pi) * angular).astype(np.float64)
  return np.stack(
      [radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()


def _previous(p: np.ndarray) -> np.ndarray:
  """For each i, the last j < i with p_j = p_i, or -1."""
  order = np.argsort(p, kind="stable")
  same = p[order[1:]] == p[order[:-1]]
  found = np.full(len(p), -1)
  found[order[1:][same]] = order[:-1][same]
  return found


def _roots(parent: np.ndarray) -> np.ndarray:
  """Where the chain i, parent_i, ... ends; a root is its own parent."""
  while True:
    above = parent[parent]
    if np.array_equal(above, parent):
      return parent
    parent = above
