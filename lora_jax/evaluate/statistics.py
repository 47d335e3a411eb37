"""Comparisons with intervals."""

from __future__ import annotations

from collections.abc import Sequence
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


@dataclasses.dataclass(frozen=True)
class Samples:
  """What a quantity is, and what it was in resamples of the data.

  Attributes:
    value: of all data.
    draws: `[resamples]`.
  """

  value: float
  draws: np.ndarray

  def interval(self, level: float = 0.95) -> tuple[float, float]:
    """Percentiles around the middle."""
    edge = 50 * (1 - level)
    low, high = np.percentile(self.draws, [edge, 100 - edge])
    return float(low), float(high)

  def p_value(self) -> float:
    """Two-sided, of 0: no smaller than resamples can tell."""
    n = len(self.draws)
    side = min((self.draws <= 0).sum(), (self.draws >= 0).sum())
    return min(1.0, 2 * (int(side) + 1) / (n + 1))


def over_seeds(
    groups: Sequence[tuple[np.ndarray, np.ndarray]],
    resamples: int = 10_000, seed: int = 0,
) -> Samples:
  """Bootstrap over seeds, and over the rows of each.

  Rows of one seed share what it trained, so seeds are drawn first (as of a
  two-stage cluster sample, Davison and Hinkley 1997, section 3.8). Whatever is
  compared row by row is given as its difference.

  Args:
    groups: of each seed `(sums [n], weights [n])` of rows, e.g. nll and tokens.
    resamples: bootstrap samples.
    seed: of the bootstrap.

  Returns:
    The mean over seeds of sum / weight.
  """
  rng = np.random.Generator(np.random.Philox(seed))
  values, draws = [], []
  for sums, weights in groups:
    sums, weights = (np.asarray(x, np.float64) for x in (sums, weights))
    n = sums.size
    values.append(sums.sum() / weights.sum())
    counts = rng.multinomial(n, np.full(n, 1 / n), size=resamples)
    draws.append((counts @ sums) / (counts @ weights))
  k = len(groups)
  chosen = rng.integers(0, k, (resamples, k))
  drawn = np.stack(draws, 1)[np.arange(resamples)[:, None], chosen]
  return Samples(float(np.mean(values)), drawn.mean(1))


def holm(p_values: Sequence[float]) -> list[float]:
  """P-values that may be compared with one level for all (Holm 1979)."""
  n, found, most = len(p_values), [0.0] * len(p_values), 0.0
  for rank, i in enumerate(np.argsort(p_values, kind="stable")):
    most = max(most, min(1.0, (n - rank) * p_values[i]))
    found[i] = most
  return found
