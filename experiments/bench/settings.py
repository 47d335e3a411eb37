"""Reads and checks what a benchmark's config says as text."""

from __future__ import annotations

from collections.abc import Mapping
import re
from typing import Any

from experiments import blocks
from experiments.bench import geometry
from lora_jax import errors
from lora_jax import quant
from lora_jax.kernels import attention
from lora_jax.models import remat

Config = Mapping[str, Any]


def shapes(field: str, text: str) -> list[tuple[int, int]]:
  """`"4x2048,8x2048"` as pairs.

  Raises:
    errors.UsageError: names the field and the part.
  """
  found = []
  for part in blocks.names(text):
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", part)
    if match is None:
      raise errors.UsageError(
          f'{field}: "{part}" is no shape; write 4x2048, several with commas')
    found.append((int(match[1]), int(match[2])))
  return _some(field, found)


def numbers(field: str, text: str) -> list[int]:
  """`"1,32"` as positive integers; raises as `shapes` does."""
  found = []
  for part in blocks.names(text):
    if not re.fullmatch(r"[1-9]\d*", part):
      raise errors.UsageError(
          f'{field}: "{part}" is no positive integer; write 1,32')
    found.append(int(part))
  return _some(field, found)


def choices(field: str, text: str, table: Mapping[str, Any]) -> list[str]:
  """Keys of a table; raises as `shapes` does."""
  found = list(blocks.names(text))
  for name in found:
    errors.choose(field, name, dict(table))
  return _some(field, found)


def check(config: Config) -> None:
  """Everything that can be told before anything is measured.

  Raises:
    errors.UsageError: for the first value that cannot be.
  """
  model, train = geometry.chosen(config["model"]), config["train"]
  for build in (blocks.quant, blocks.skip, blocks.adapter, blocks.optim,
                blocks.precision, blocks.base_dtype, blocks.offload):
    build(config)
  errors.choose("compute.attention", config["compute"]["attention"],
                attention.CHOICES)
  shapes("train.shapes", train["shapes"])
  # One that is chosen by itself has no place among those compared.
  choices("train.remat", train["remat"],
          {name: how for name, how in remat.POLICIES.items()
           if name != "auto"})
  numbers("decode.batches", config["decode"]["batches"])
  choices("kernels.formats", config["kernels"]["formats"], quant.FORMATS)
  shapes("kernels.shapes", config["kernels"]["shapes"])
  numbers("kernels.rows", config["kernels"]["rows"])
  for block, name, least in (
      ("train", "packed", 0), ("train", "accumulation", 1),
      ("train", "warmup", 1), ("train", "steps", 1), ("decode", "prompt", 1),
      ("decode", "new", 2), ("decode", "repeats", 1),
      ("kernels", "span_bytes", 1), ("ceilings", "copy_bytes", 4),
      ("ceilings", "matmul", 16), ("ceilings", "products", 1)):
    value = config[block][name]
    if value < least:
      raise errors.UsageError(
          f"{block}.{name}={value} is out of range; use an integer of at "
          f"least {least}")
  tokens = config["decode"]["prompt"] + config["decode"]["new"]
  if tokens > model.max_position:
    raise errors.UsageError(
        f"decode.prompt + decode.new = {tokens} tokens are beyond the "
        f"geometry's context of {model.max_position}; lower them, or add "
        f"max_position={tokens} to model.changes")


def _some(field, found):
  if not found:
    raise errors.UsageError(f"{field} is empty; name at least one")
  return found
