"""Options of a method or a start: from what a config says to its dataclass."""

from __future__ import annotations

import dataclasses
from typing import Any

from lora_jax import errors


def parse(place: str, given: Any, kind: type) -> Any:
  """`given` as a `kind`, each value as its default's type.

  Args:
    place: of the config, for errors: "adapter.options".
    given: a mapping, perhaps of texts, or a `kind`.
    kind: a dataclass; its `validate`, if it has one, is called.

  Raises:
    errors.UsageError: if an option is unknown, or a value is none.
  """
  if isinstance(given, kind):
    return given
  if dataclasses.is_dataclass(given):
    raise errors.UsageError(
        f"{place}={given} belongs to another method; give {kind.__name__}")
  known = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore
  found = {}
  for name, value in given.items():
    field = errors.choose(place, name, known)
    found[name] = _like(f"{place}.{name}", value, field.default)
  made = kind(**found)
  check = getattr(made, "validate", None)
  if check is not None:
    check()
  return made


def _like(place: str, value: Any, default: Any) -> Any:
  """A value, perhaps of a command line, as its default's type."""
  if isinstance(default, bool):
    if value in (True, False):
      return bool(value)
    if str(value).lower() in ("true", "false"):
      return str(value).lower() == "true"
    raise errors.UsageError(f"{place}={value} is no bool; use true or false")
  if isinstance(default, tuple):
    parts = value.split("+") if isinstance(value, str) else value
    kind = type(default[0]) if default else str
    try:
      return tuple(kind(part) for part in parts)
    except (TypeError, ValueError):
      raise errors.UsageError(
          f"{place}={value} is no list of {kind.__name__}; write some with + "
          "between them") from None
  kind = type(default)
  try:
    number = kind(value)
  except (TypeError, ValueError):
    number = None
  if number is None or (kind is int and float(value) != number):
    raise errors.UsageError(
        f"{place}={value} is no {kind.__name__}; use one such as {default}")
  return number
