"""Wall-clock time of work on a device.

Calls return before the device is done. They are issued a little ahead of it,
as in a training loop, and a call's time is the distance between the moment at
which it was done and that of the one before: neither launch nor transfer is
in it, unless the device has to wait for them.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
import dataclasses
import itertools
import math
import statistics
import time
from typing import Any

import jax

# Results that may exist at once, beside the one that is computed.
AHEAD = 1
# Seconds of a timing, beside which the wait for the device is nothing.
LEAST = 0.03


@dataclasses.dataclass(frozen=True)
class Times:
  """Seconds of a call, measured several times."""

  seconds: tuple[float, ...]

  @property
  def median(self) -> float:
    return statistics.median(self.seconds)

  def row(self, name: str) -> dict[str, float | int]:
    """`{name: median, name_min: ..., name_max: ..., "n": ...}`."""
    return {name: self.median, f"{name}_min": min(self.seconds),
            f"{name}_max": max(self.seconds), "n": len(self.seconds)}


def completions(
    call: Callable[[], Any], count: int, ahead: int = AHEAD) -> list[float]:
  """Moments, in seconds, at which each of `count` calls was done.

  Args:
    call: gives arrays that a device is still working on, or on CPU perhaps
      such as are done: the last calls are then waited for at once. That is
      why there are `ahead` more of them, without a moment.
    count: how many are clocked.
    ahead: calls issued after one before it is waited for.
  """
  pending: collections.deque[Any] = collections.deque()
  moments = []
  for _ in range(count + ahead):
    pending.append(call())
    if len(pending) > ahead:
      jax.block_until_ready(pending.popleft())
      moments.append(time.perf_counter())
  jax.block_until_ready(list(pending))
  return moments


def steps(call: Callable[[], Any], n: int, warmup: int = 1) -> Times:
  """Times of `n` single calls, after at least one and `warmup` others."""
  moments = completions(call, max(warmup, 1) + n)[-n - 1:]
  return Times(tuple(b - a for a, b in itertools.pairwise(moments)))


def repeated(
    call: Callable[[], Any], n: int = 7, least: float = LEAST) -> Times:
  """Times of a short call: `n` times as many as take `least` seconds.

  Args:
    call: compiled or not; the first two calls are not counted.
    n: timings.
    least: seconds of a timing.
  """
  jax.block_until_ready(call())
  start = time.perf_counter()
  jax.block_until_ready(call())
  once = time.perf_counter() - start
  calls = min(max(math.ceil(least / max(once, 1e-7)), 1), 1000)
  moments = completions(call, n * calls + 1)[::calls]
  return Times(tuple((b - a) / calls for a, b in itertools.pairwise(moments)))
