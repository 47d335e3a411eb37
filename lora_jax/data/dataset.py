"""Datasets of encoded examples: selection, lengths, splits, permutations."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses

import numpy as np

from lora_jax import errors
from lora_jax.data import templates


@dataclasses.dataclass(frozen=True)
class Dataset(Sequence[templates.Encoded]):
  """Encoded examples and their global ids.

  Attributes:
    encoded: the examples.
    ids: int32 [n], index of each in the source, kept by every selection, so
      that randomness folded over it does not depend on the selection.
  """

  encoded: tuple[templates.Encoded, ...]
  ids: np.ndarray

  def __len__(self) -> int:
    return len(self.encoded)

  def __getitem__(self, i):
    return self.encoded[i]

  @property
  def lengths(self) -> np.ndarray:
    """Tokens of each example, int64 [n]."""
    return np.asarray([len(e.tokens) for e in self.encoded], np.int64)

  def select(self, indices: Sequence[int] | np.ndarray) -> Dataset:
    """The examples at `indices` (positions, not ids), in that order."""
    return Dataset(tuple(self.encoded[i] for i in indices),
                   self.ids[np.asarray(indices, np.int64)])


def of(encoded: Sequence[templates.Encoded]) -> Dataset:
  """A `Dataset` of examples numbered in order; a `Dataset` as it is."""
  if isinstance(encoded, Dataset):
    return encoded
  return Dataset(tuple(encoded), np.arange(len(encoded), dtype=np.int32))


@dataclasses.dataclass(frozen=True)
class Counts:
  """What `fit` did: examples kept (cut ones among them), cut, dropped."""

  kept: int
  truncated: int
  dropped: int


def fit(
    encoded: Sequence[templates.Encoded], max_length: int,
    overlong: str = "error",
) -> tuple[Dataset, Counts]:
  """Examples of at most `max_length` tokens.

  Args:
    encoded: the examples.
    max_length: tokens.
    overlong: what to do with longer ones. `"error"` names the first;
      `"truncate"` keeps the head, and drops the example if no token with a
      weight is left; `"drop"` drops them.

  Returns:
    The examples, with their ids, and the counts.

  Raises:
    UsageError: another value of `overlong`.
    UserError: an over-long example under `"error"`; nothing left.
  """
  errors.choose("data.overlong", overlong,
                dict.fromkeys(("error", "truncate", "drop")))
  data = of(encoded)
  kept: list[int] = []
  result: list[templates.Encoded] = []
  truncated = 0
  for i, example in enumerate(data.encoded):
    if (n := len(example.tokens)) > max_length:
      if overlong == "error":
        count = int((data.lengths > max_length).sum())
        raise errors.UserError(
            f"{example.source or f'example {i}'}: {n} tokens, more than "
            f"data.max_length={max_length} (as are {count} of {len(data)} "
            f"rows); raise it to {int(data.lengths.max())}, or set "
            'data.overlong to "truncate" or "drop"')
      if overlong == "drop" or not example.weights[1:max_length].any():
        continue
      example = dataclasses.replace(
          example, tokens=example.tokens[:max_length],
          weights=example.weights[:max_length])
      truncated += 1
    kept.append(i)
    result.append(example)
  if not result:
    raise errors.UserError(
        f"none of {len(data)} rows fits data.max_length={max_length} with "
        "tokens to learn; raise it")
  return (Dataset(tuple(result), data.ids[kept]),
          Counts(len(result), truncated, len(data) - len(result)))


def unique(encoded: Sequence[templates.Encoded]) -> Dataset:
  """The examples whose tokens are not those of an earlier one.

  `[1 2] [3] [1 2]` becomes `[1 2] [3]`, with the ids 0 and 1.
  """
  data = of(encoded)
  first: dict[bytes, int] = {}
  for i, example in enumerate(data.encoded):
    first.setdefault(np.asarray(example.tokens, np.int32).tobytes(), i)
  return data.select(list(first.values()))


def split(
    n: int, holdout: int | float, seed: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Positions to train on and positions held out, both ascending.

  Args:
    n: number of examples.
    holdout: how many to hold out, or, as a float in [0, 1), which share.
    seed: of the choice.

  Returns:
    int64 [n - m] and int64 [m], disjoint; together all of 0..n-1.

  Raises:
    UserError: nothing would be left to train on.
  """
  m = round(holdout * n) if isinstance(holdout, float) else holdout
  if not 0 <= m < n:
    raise errors.UserError(
        f"data.holdout={holdout} of {n} rows leaves {n - m} to train on; set "
        f"it between 0 and {n - 1}")
  order = permutation(n, seed, 0, stream=1)
  return np.sort(order[m:]), np.sort(order[:m])


def permutation(n: int, seed: int, epoch: int, stream: int = 0) -> np.ndarray:
  """A permutation of 0..n-1, int64 [n], a pure function of its arguments.

  Sorts the raw output of Philox, which numpy promises not to change (the
  shuffles of `Generator` may change between versions).
  """
  bits = np.random.Philox(
      key=np.asarray([seed, 0], np.uint64),
      counter=np.asarray([0, 0, epoch, stream], np.uint64))
  return np.argsort(bits.random_raw(n), kind="stable")


@dataclasses.dataclass(frozen=True)
class LengthStatistics:
  """Lengths of a dataset, in tokens.

  Attributes:
    count: examples.
    tokens: tokens of all examples.
    weighted: tokens with a weight among them.
    minimum: tokens of the shortest example.
    median: tokens.
    p95: tokens, 95th percentile (interpolated).
    maximum: tokens of the longest example.
    share_over: for each threshold, the share of longer examples.
  """

  count: int
  tokens: int
  weighted: int
  minimum: int
  median: float
  p95: float
  maximum: int
  share_over: dict[int, float]

  def __str__(self) -> str:
    over = "".join(
        f", {share:.1%} over {n}" for n, share in self.share_over.items())
    return (f"{self.count} rows, {self.tokens} tokens ({self.weighted} with "
            f"loss); a row: min {self.minimum}, median {self.median:g}, p95 "
            f"{self.p95:g}, max {self.maximum}{over}")


def length_statistics(
    encoded: Sequence[templates.Encoded], thresholds: Sequence[int] = (),
) -> LengthStatistics:
  """Statistics of the lengths.

  Args:
    encoded: the examples, at least one.
    thresholds: lengths of interest, e.g. `data.max_length`.
  """
  data = of(encoded)
  lengths = data.lengths
  return LengthStatistics(
      count=len(lengths), tokens=int(lengths.sum()),
      weighted=sum(int(np.count_nonzero(e.weights[1:])) for e in data.encoded),
      minimum=int(lengths.min()), median=float(np.median(lengths)),
      p95=float(np.percentile(lengths, 95)), maximum=int(lengths.max()),
      share_over={int(n): float((lengths > n).mean()) for n in thresholds})
