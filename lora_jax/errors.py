"""Errors for users: one line that names the value, the place and the remedy."""

from __future__ import annotations

from collections.abc import Iterable
import difflib


class UserError(ValueError):
  """A mistake in the input, not in the program.

  The commands print its message as one line and exit with 1, without a
  traceback. The message names the offending value, where it stands (file and
  row, or config key), and what to do about it.
  """


class UsageError(UserError):
  """A mistake in a command line or config; the commands exit with 2."""


def nearest(name: str, candidates: Iterable[str]) -> str:
  """`'; did you mean "rank"?'` for the closest candidate, else all of them.

  Args:
    name: what was written.
    candidates: what would have been right.

  Returns:
    A phrase to append to a message.
  """
  candidates = [str(c) for c in candidates]
  close = difflib.get_close_matches(str(name), candidates, n=1, cutoff=0.6)
  if close:
    return f'; did you mean "{close[0]}"?'
  return f"; known: {', '.join(sorted(candidates))}"


def choose(kind: str, name: str, table: dict):
  """`table[name]`, or a `UsageError` that names the nearest key.

  Args:
    kind: what is being chosen, e.g. `"adapter.method"`.
    name: the key.
    table: a registry.

  Returns:
    The registry's row.

  Raises:
    UsageError: if `name` is not in `table`.
  """
  if name not in table:
    raise UsageError(f'{kind}="{name}" is unknown{nearest(name, table)}')
  return table[name]
