"""Cells of a study: which fields of its config take which values.

  cross({"adapter.rank": (1, 8, 64)}, {"seed": (0, 1, 2)})    all 9
  zipped({"adapter.rank": (8, 64), "adapter.alpha": (16, 128)})   2
  cross(...) + cross(...)                                         one by one
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import itertools
from typing import Any

Cells = list[dict[str, Any]]

# What most studies vary beside what they are about. An arm's best is to lie
# inside; the results of some are of before the lowest was there.
RATES = {"optim.learning_rate": (3e-4, 1e-3, 3e-3)}
TWO_RATES = {"optim.learning_rate": (1e-3, 3e-3)}
SEEDS = {"seed": (0, 1, 2)}


def zipped(fields: Mapping[str, Sequence[Any]]) -> Cells:
  """Cells in which the fields change together.

  Raises:
    ValueError: if they have different numbers of values.
  """
  counts = {name: len(values) for name, values in fields.items()}
  if len(set(counts.values())) > 1:
    raise ValueError(
        f"fields that change together have different numbers of values: "
        f"{counts}")
  return [dict(zip(fields, values, strict=True))
          for values in zip(*fields.values(), strict=True)]


def cross(*parts: Mapping[str, Sequence[Any]] | Cells) -> Cells:
  """Every combination of the parts' cells; a mapping is every combination of
  its fields' values."""
  lists = [
      cross(*([{name: value} for value in values]
              for name, values in part.items()))
      if isinstance(part, Mapping) else part for part in parts]
  found = []
  for cells in itertools.product(*lists):
    merged: dict[str, Any] = {}
    for cell in cells:
      merged |= cell
    found.append(merged)
  return found


def better(
    text: str, arm: Mapping[str, Any], than: Mapping[str, Any],
    by: float = 0.0, of: str = "held_out", times: float = 1.0,
) -> dict[str, Any]:
  """The claim that an arm's held-out loss is lower than another's.

  Args:
    text: what is claimed.
    arm, than: fields that tell the two from the others.
    by: nats a token.
    of: in its place "watched": how much the loss of data.watch_path rose.
    times: what the other's is multiplied by: 0.5 for "no more than half".
  """
  return {"text": text, "kind": "better", "arm": dict(arm), "than": dict(than),
          "by": by, "of": of, "times": times}


def between(
    text: str, arm: Mapping[str, Any], field: str, low: float, high: float,
) -> dict[str, Any]:
  """The claim that a number of an arm's summaries is in a range."""
  return {"text": text, "kind": "between", "arm": dict(arm), "field": field,
          "low": low, "high": high}


def rises(text: str, arm: Mapping[str, Any]) -> dict[str, Any]:
  """The claim that an arm forgets: the loss of data.watch_path is higher."""
  return {"text": text, "kind": "rises", "arm": dict(arm)}


def same(
    text: str, arm: Mapping[str, Any], than: Mapping[str, Any],
    within: float = 0.01) -> dict[str, Any]:
  """The claim that two arms do not differ by more than `within` nats."""
  return {"text": text, "kind": "same", "arm": dict(arm), "than": dict(than),
          "within": within}
