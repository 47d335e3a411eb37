"""Reading datasets: files, folders, hub names -> examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import csv
import io
import json
import pathlib
from typing import Any, TypeAlias

from lora_jax import errors
from lora_jax.data import formats
from lora_jax.data import places

Rows: TypeAlias = Iterator[tuple[str, Any]]  # (source, row)


def read(
    path: str | pathlib.Path, format: str = "auto", split: str = "train",
) -> list[formats.Example]:
  """All rows of a dataset, in order.

  Args:
    path: a `.json` (list of rows), `.jsonl`, `.csv` or `.parquet` file; a
      folder of such files; a folder of `datasets.save_to_disk`; or a name on
      the Hugging Face hub (`owner/name`, or `owner/name:subset`).
    format: a key of `formats.FORMATS`; `"auto"` looks at the keys of each
      file's first row, `"mixed"` at those of every row.
    split: which split of a `DatasetDict` or hub dataset.

  Returns:
    The examples; `source` is `path:line` for JSONL and CSV, `path:row`
    (from 1) otherwise.

  Raises:
    UsageError: unknown format or split.
    UserError: missing, empty or malformed files and rows.
  """
  if format not in ("auto", "mixed"):
    errors.choose("data.format", format, formats.FORMATS)
  location = pathlib.Path(path)
  if location.is_dir():
    return _folder(location, format, split)
  if location.is_file():
    return _examples(location, _file(location), format)
  if _is_hub_name(str(path)):
    return _examples(location, _hub(str(path), split), format)
  raise errors.UserError(
      f"{path}: no such file or folder{places.nearest_sibling(location)}; "
      "correct data.path")


def _examples(
    path: pathlib.Path, rows: Rows, format: str) -> list[formats.Example]:
  result: list[formats.Example] = []
  for source, row in rows:
    if format == "auto" and isinstance(row, dict):
      format = formats.detect(row, source)
    result.append(formats.convert(
        row, "auto" if format == "mixed" else format, source))
  if not result:
    raise errors.UserError(
        f"{path}: the file is empty; give one with at least one row")
  return result


def _folder(
    path: pathlib.Path, format: str, split: str) -> list[formats.Example]:
  if (path / "dataset_dict.json").is_file() or (
      path / "dataset_info.json").is_file():
    return _examples(path, _saved(path, split), format)
  files = sorted(p for p in path.iterdir() if p.suffix in READERS)
  if not files:
    raise errors.UserError(
        f"{path}: the folder holds neither a saved dataset nor "
        f"{', '.join(READERS)} files; correct data.path")
  return [x for file in files for x in _examples(file, _file(file), format)]


def _file(path: pathlib.Path) -> Rows:
  if path.suffix not in READERS:
    raise errors.UserError(
        f'{path}: the file type "{path.suffix}" is unknown; convert it to one '
        f"of {', '.join(READERS)}")
  return READERS[path.suffix](path)


def _decoded(path: pathlib.Path) -> str:
  try:
    data = path.read_bytes()
    return data.decode("utf-8-sig")
  except OSError as error:
    raise errors.UserError(
        f"{path}: {error.strerror}; make the file readable") from error
  except UnicodeDecodeError as error:
    line = data.count(b"\n", 0, error.start) + 1
    raise errors.UserError(
        f"{path}:{line}: byte {error.start} (0x{data[error.start]:02x}) is not "
        "UTF-8; convert the file to UTF-8") from error


def _json(path: pathlib.Path) -> Rows:
  try:
    rows = json.loads(_decoded(path) or "[]")
  except json.JSONDecodeError as error:
    raise errors.UserError(
        f"{path}:{error.lineno}: malformed JSON at column {error.colno} "
        f"({error.msg}); correct it, or name the file .jsonl if every line is "
        "a row") from error
  if not isinstance(rows, list):
    raise errors.UserError(
        f"{path}: holds a {type(rows).__name__}, not a list of rows; wrap it "
        "in [ ]")
  for i, row in enumerate(rows, 1):
    yield f"{path}:{i}", row


def _jsonl(path: pathlib.Path) -> Rows:
  # Not splitlines(): it also splits at U+2028, which JSON texts may hold.
  for number, line in enumerate(_decoded(path).split("\n"), 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
    except json.JSONDecodeError as error:
      raise errors.UserError(
          f"{path}:{number}: malformed JSON at column {error.colno} "
          f"({error.msg}); correct or delete the line") from error
    yield f"{path}:{number}", row


def _csv(path: pathlib.Path) -> Rows:
  reader = csv.DictReader(
      io.StringIO(_decoded(path), newline=""), strict=True)
  try:
    for row in reader:
      place = f"{path}:{reader.line_num}"
      if None in row:
        raise errors.UserError(
            f"{place}: more cells than the header's {len(row) - 1} columns; "
            "quote cells that contain commas")
      yield place, row
  except csv.Error as error:
    raise errors.UserError(
        f"{path}:{reader.line_num}: malformed CSV ({error}); correct it or "
        "convert the file to JSONL") from error


def _parquet(path: pathlib.Path) -> Rows:
  import pyarrow.parquet  # Heavy; comes with `datasets`.

  try:
    rows = pyarrow.parquet.read_table(path).to_pylist()
  except Exception as error:  # pyarrow's errors share no useful base.
    raise errors.UserError(
        f"{path}: not a readable Parquet file ({_one_line(error)}); write or "
        "download it again") from error
  for i, row in enumerate(rows, 1):
    yield f"{path}:{i}", row


READERS: dict[str, Callable[[pathlib.Path], Rows]] = {
    ".json": _json, ".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}


def _saved(path: pathlib.Path, split: str) -> Rows:
  import datasets  # Heavy.

  try:
    data = datasets.load_from_disk(str(path))
  except Exception as error:
    raise errors.UserError(
        f"{path}: not a readable saved dataset ({_one_line(error)}); save it "
        "again with datasets.save_to_disk") from error
  if isinstance(data, datasets.DatasetDict):
    data = errors.choose("data.split", split, dict(data))
  for i, row in enumerate(data, 1):
    yield f"{path}:{i}", row


def _hub(name: str, split: str) -> Rows:
  import datasets  # Heavy.

  repository, _, subset = name.partition(":")
  try:
    data = datasets.load_dataset(repository, subset or None, split=split)
  except Exception as error:
    raise errors.UserError(
        f"{name}: neither a file or folder here nor a dataset that the hub "
        f"gave ({_one_line(error)}); correct data.path, or download it and "
        "give its folder") from error
  for i, row in enumerate(data, 1):
    yield f"{name}:{i}", row


def _is_hub_name(path: str) -> bool:
  """`owner/name`, unless a folder `owner` here makes it a mistyped path."""
  location = pathlib.Path(path)
  return (not location.is_absolute() and len(location.parts) == 2
          and path == "/".join(location.parts)
          and location.suffix not in READERS
          and location.parts[0] not in (".", "..", "~")
          and not location.parent.is_dir())


def _one_line(error: Exception) -> str:
  return " ".join(str(error).split())[:160]
