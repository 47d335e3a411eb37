"""One part in a process of its own; see `isolated`.

It reads {"part": ..., "config": {...}, "started": ...} from stdin and prints
its lines as JSON objects.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import json
import sys
import time
from typing import Any

import jax

from experiments.bench import built as built_lib
from experiments.bench import ceilings
from experiments.bench import decode
from experiments.bench import kernels
from experiments.bench import lines
from experiments.bench import settings as settings_lib
from experiments.bench import train
from lora_jax import errors
from lora_jax.train import step as step_lib


def first_step(
    config: Mapping[str, Any], emit: lines.Emit, started: float) -> None:
  """Emits the seconds since `started` at which each stage was done."""
  stages = {"imports_s": time.time() - started}
  model = built_lib.build(config)
  jax.block_until_ready((model.base, model.adapters))
  stages["model_s"] = time.time() - started
  shape = settings_lib.shapes("train.shapes", config["train"]["shapes"])[0]
  remat = config["train"]["remat"].split(",")[0].strip()
  made = train.program(config, model, shape, remat)
  jax.block_until_ready(step_lib.train_step(*made.args, **made.statics))
  stages["first_step_s"] = time.time() - started
  emit({"part": "startup", "name": "first step", **model.case,
        "batch": shape[0], "length": shape[1], "remat": remat,
        **lines.tidy(stages)})


PARTS: dict[str, Callable[[Mapping[str, Any], lines.Emit], None]] = {
    "ceilings": ceilings.run,
    "kernels": kernels.run,
    "train": train.run,
    "decode": decode.run,
}


def execute(
    part: str, config: Mapping[str, Any], emit: lines.Emit,
    started: float | None = None) -> None:
  """Runs a part here; a line with `error` if it fails as a whole.

  Args:
    part: a key of `PARTS`, or `"startup"`.
    config: resolved.
    emit: takes the lines.
    started: when the process was, as `time.time()`; of `"startup"`.
  """
  precision = ("highest" if config["compute"]["dtype"] == "float32" else None)
  try:
    stamped = lines.stamped(emit)
    with jax.default_matmul_precision(precision):
      if part == "startup":
        first_step(config, stamped, started or time.time())
      else:
        errors.choose("parts", part, PARTS)(config, stamped)
  except Exception as error:
    emit({"part": part, "name": "all", "error": lines.reason(error)})


def main() -> None:
  request = json.load(sys.stdin)
  execute(
      request["part"], request["config"],
      lambda line: print(json.dumps(line), flush=True), request["started"])


if __name__ == "__main__":
  main()
