"""From nothing to the first step: a new process, without and with programs
that an earlier one compiled.

The model is random and made on the device: reading a checkpoint is not in it.
"""

from __future__ import annotations

from collections.abc import Mapping
import pathlib
import tempfile
from typing import Any

from experiments.bench import isolated
from experiments.bench import lines


def run(config: Mapping[str, Any], emit: lines.Emit) -> None:
  """Emits a line for a start with an empty cache, and one for the next."""
  with tempfile.TemporaryDirectory() as folder:
    env = {"JAX_COMPILATION_CACHE_DIR": folder,
           "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
           "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    for cache in ("empty", "filled"):

      def add(line, cache=cache):
        emit(line | {"cache": cache, "cached_programs": len(
            list(pathlib.Path(folder).glob("*-cache")))})

      isolated.run("startup", config, add, env)
