"""Layer replication: a deeper model out of the same weights.

  "0-4,2-5"   layers 0 1 2 3 2 3 4 of the base, one after the other

as Hugging Face PEFT's `layer_replication: [[0, 4], [2, 5]]`: ranges without
their ends. Repetitions share the base's weights; each has adapters, and keys
and values, of its own, under the numbers of the deeper model.
"""

from __future__ import annotations

from collections.abc import Sequence
import re

from lora_jax import errors

FIELD = "adapter.layer_replication"


def ranges(
    given: str | Sequence[Sequence[int]] | None) -> list[list[int]]:
  """`"0-4,2-5"`, or pairs, as `[[0, 4], [2, 5]]`; of nothing, `[]`.

  Raises:
    errors.UsageError: if it is neither.
  """
  if isinstance(given, str):
    parts = [part.strip() for part in given.split(",") if part.strip()]
    matches = [re.fullmatch(r"(\d+)\s*-\s*(\d+)", part) for part in parts]
    found = [match and [int(n) for n in match.groups()] for match in matches]
  else:
    parts = list(given or ())  # type: ignore[arg-type]
    found = [[int(n) for n in part] if len(part) == 2 else None
             for part in parts]
  for part, pair in zip(parts, found):
    if pair is None or not 0 <= pair[0] < pair[1]:
      raise errors.UsageError(
          f'{FIELD}: "{part}" is no range of layers; write "0-4,2-5", ranges '
          "without their ends")
  return found  # type: ignore[return-value]


def order(
    given: str | Sequence[Sequence[int]] | None, depth: int
) -> tuple[int, ...]:
  """The base's layer of each of the deeper model's; () if nothing changes.

  Args:
    given: see `ranges`.
    depth: layers of the base.

  Raises:
    errors.UsageError: see `ranges`; and if a layer does not exist.
  """
  found: list[int] = []
  for start, stop in ranges(given):
    if stop > depth:
      raise errors.UsageError(
          f'{FIELD}: "{start}-{stop}" goes beyond the model, which has layers '
          f"0 to {depth - 1}; end at {depth} at most")
    found += range(start, stop)
  return tuple(found) if found != list(range(depth)) else ()
