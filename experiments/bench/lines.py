"""One measurement, one JSON object; and what has to stand beside it."""

from __future__ import annotations

from collections.abc import Callable
import math
import os
import platform
from typing import Any

import jax

from lora_jax import errors

Line = dict[str, Any]
Emit = Callable[[Line], None]


def stamped(emit: Emit) -> Emit:
  """`emit` of lines that say where they come from.

  `compilation_cache` says whether programs may have been compiled by an
  earlier process (JAX_COMPILATION_CACHE_DIR): seconds of compilation mean
  nothing then.
  """
  device = jax.devices()[0]
  cache = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
  stamp = {
      "device": device.device_kind, "platform": device.platform,
      "devices": jax.device_count(), "jax": jax.__version__,
      "python": platform.python_version(),
      "xla_flags": os.environ.get("XLA_FLAGS", ""),
      "compilation_cache": cache is not None}
  return lambda line: emit(line | stamp)


def attempt(emit: Emit, case: Line, measure: Callable[[], Line]) -> None:
  """Emits `case` with what `measure` finds, or with the reason why not."""
  try:
    found = measure()
  except Exception as error:  # The other measurements are still of interest.
    found = {"error": reason(error)}
  emit(case | tidy(found))


def reason(error: BaseException) -> str:
  """One line about what went wrong."""
  text = next(iter(str(error).strip().splitlines()), "")[:300]
  if isinstance(error, errors.UserError):
    return text
  return f"{type(error).__name__}: {text}" if text else type(error).__name__


def tidy(values: Line) -> Line:
  """Numbers with six digits; None for what JSON cannot hold."""

  def one(value):
    if not isinstance(value, float):
      return value
    return float(f"{value:.6g}") if math.isfinite(value) else None

  return {name: one(value) for name, value in values.items()}


class Shares:
  """Sets rates in relation to the ceilings measured before them.

  A line of `ceilings` is remembered; later ones get

    share_of_matmul   model_tflops / bfloat16 products
    share_of_copy     gb_per_s / copies on the device
  """

  def __init__(self):
    self._ceilings: dict[str, float] = {}

  def __call__(self, line: Line) -> Line:
    if line["part"] == "ceilings":
      for name in ("tflops", "gb_per_s"):
        if name in line:
          self._ceilings[line["name"]] = line[name]
      return line
    found = {}
    for rate, ceiling, share in (
        ("model_tflops", "matmul bfloat16", "share_of_matmul"),
        ("gb_per_s", "copy", "share_of_copy")):
      if rate in line:
        known = self._ceilings.get(ceiling)
        found[share] = line[rate] / known if known else None
    return line | tidy(found)
