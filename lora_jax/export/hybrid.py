"""Adapter folders of several methods: one folder of `peft` a part.

  hybrid.json                    {"order": ["lora", "houlsby"]}
  lora/adapter_config.json       the innermost part, as PEFT reads it
  lora/adapter_model.safetensors
  houlsby/...
"""

from __future__ import annotations

from collections.abc import Sequence
import json
import pathlib

from lora_jax import errors
from lora_jax.adapters import hybrid

FILE = "hybrid.json"


def order(folder: pathlib.Path) -> list[str] | None:
  """Names of the parts of a folder; None if it holds one adapter only.

  Raises:
    errors.UserError: if the file is damaged, or a part is missing.
  """
  path = folder / FILE
  if not path.exists():
    return None
  try:
    names = json.loads(path.read_text())["order"]
    sound = all(hybrid.NAME.fullmatch(name) for name in names) and len(
        set(names)) == len(names) > 0
  except (ValueError, KeyError, TypeError):
    sound = False
  if not sound:
    raise errors.UserError(
        f'{path} is damaged; write {{"order": [...]}}, the names of the '
        "folders beside it, the innermost part first")
  for name in names:
    if not (folder / name).is_dir():
      raise errors.UserError(
          f"{path}: there is no folder {folder / name}; save the adapter again")
  return names


def write(folder: pathlib.Path, names: Sequence[str]) -> None:
  """Writes `hybrid.json`."""
  text = json.dumps({"order": list(names)}, indent=2) + "\n"
  (folder / FILE).write_text(text, encoding="utf-8")
