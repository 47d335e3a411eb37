"""Folders that are written whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import pathlib
import shutil

from lora_jax import errors


@contextlib.contextmanager
def replaced(folder: pathlib.Path, marker: str) -> Iterator[pathlib.Path]:
  """Gives a fresh sibling that takes `folder`'s place when the block ends.

  Whoever is killed in between leaves the old folder, or the new one; between
  the two renames the old one is `<name>.old`, which the next call puts back.

  Args:
    folder: what is written, or replaced.
    marker: a file that says that a folder is of this kind; one that holds
      other files is left alone.

  Yields:
    An empty folder to write into.

  Raises:
    errors.UserError: if `folder` is something else, or cannot be written.
  """
  folder = pathlib.Path(folder)
  fresh = folder.with_name(folder.name + ".tmp")
  old = folder.with_name(folder.name + ".old")
  try:
    if not folder.exists() and old.exists():
      old.rename(folder)
    if folder.exists() and not folder.is_dir():
      raise errors.UserError(
          f"{folder} is a file; name a folder that does not exist yet")
    if (folder.is_dir() and any(folder.iterdir())
        and not (folder / marker).exists()):
      raise errors.UserError(
          f"{folder} holds other files and no {marker}; name a folder that "
          "does not exist yet")
    for leftover in (fresh, old):
      shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
      yield fresh
      if folder.exists():
        folder.rename(old)
      fresh.rename(folder)
    finally:
      shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
  except OSError as error:
    raise errors.UserError(
        f"{folder}: {error.strerror or error}; free space, mend its "
        "permissions, or choose another folder (what was there is intact)"
    ) from error
