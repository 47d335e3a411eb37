"""Where a mistyped path probably meant to point."""

from __future__ import annotations

import difflib
import pathlib


def nearest_sibling(path: pathlib.Path) -> str:
  """`'; did you mean "train.jsonl"?'`, a phrase to append to a message.

  Args:
    path: a path that does not exist.

  Returns:
    The closest name in its folder; that the folder is missing too; or `""`.
  """
  if not path.parent.is_dir():
    return f" (nor a folder {path.parent})"
  close = difflib.get_close_matches(
      path.name, [p.name for p in path.parent.iterdir()], n=1, cutoff=0.5)
  return f'; did you mean "{path.parent / close[0]}"?' if close else ""
