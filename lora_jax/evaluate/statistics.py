"""Comparisons with intervals."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Difference:
  """`after - before` with a 95% interval; nats a token."""

  mean: float
  low: float
  high: float

  def __str__(self) -> str:
    return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def paired_difference(
    before: np.ndarray,
    after: np.ndarray,
    weight: np.ndarray,
    resamples: int = 10_000,
    seed: int = 0,
) -> Difference:
  """Paired bootstrap over rows of the difference in mean nats a token.

  A row is a document: its tokens are not independent, so rows are what is
  drawn. Both sides are drawn together (Koehn 2004, "Statistical significance
  tests for machine translation evaluation").

  Args:
    before: `[n]`, sum of nll of each row.
    after: `[n]`, the same rows after.
    weight: `[n]`, tokens of each row.
    resamples: bootstrap samples.
    seed: of the bootstrap.

  Returns:
    The difference of the whole set, and the 2.5% and 97.5% percentiles.
  """
  delta = np.asarray(after, np.float64) - np.asarray(before, np.float64)
  weight = np.asarray(weight, np.float64)
  n = delta.size
  rng = np.random.Generator(np.random.Philox(seed))
  # Multinomial counts: one row of draws at a time would not fit in memory.
  counts = rng.multinomial(n, np.full(n, 1 / n), size=resamples)
  means = (counts @ delta) / (counts @ weight)
  low, high = np.percentile(means, [2.5, 97.5])
  return Difference(float(delta.sum() / weight.sum()), float(low), float(high))
