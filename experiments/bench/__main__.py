"""How fast this machine trains and generates, and what it could do.

  python -m experiments.bench --config=configs/bench.py
  python -m experiments.bench --config=configs/bench.py:llama2-7b \\
      --config.train.shapes=4x2048,8x2048 --output=bench.jsonl
  python -m experiments.bench --config=configs/bench.py:llama2-7b,n_layers=4 \\
      --config.parts=ceilings,train --peers=FOLDER

Parts, each in a process of its own:

  ceilings  copies on the device, matrix products, transfers from the host
  kernels   dequantisation and products with quantised weights
  train     steps of fine-tuning: tokens/s, TFLOP/s, memory, compilation
  decode    greedy generation
  startup   from nothing to the first step
  peers     PyTorch's fine-tuning from the scripts in --peers, if given

Weights and tokens are random. A part that fails says why, and the others go
on. --output gets one JSON object a measurement, with device, versions, commit
and command.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import datetime
import json
import shlex
import sys
from typing import Any

from absl import flags
import jax
from ml_collections import config_flags

from experiments import blocks
from experiments import cli
from experiments.bench import isolated
from experiments.bench import lines
from experiments.bench import peers
from experiments.bench import settings
from experiments.bench import startup
from experiments.bench import table
from lora_jax import errors
from lora_jax.train import workdir

# Name -> how it runs; the parts of `child` in processes of their own.
PARTS: dict[str, Callable[[Mapping[str, Any], lines.Emit], None] | None] = {
    "ceilings": None, "kernels": None, "train": None, "decode": None,
    "startup": startup.run}


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
  """Adds this command's flags."""
  own: dict[str, Any] = {"flag_values": values}
  config_flags.DEFINE_config_file(
      "config", None, "configs/bench.py, with :geometry behind it or not.",
      **own)
  flags.DEFINE_string(
      "output", None, "A .jsonl file that the measurements are added to.",
      **own)
  flags.DEFINE_string(
      "peers", None, "A folder with torch_qlora.py and bnb_kernels.py.", **own)


def main(
    values: flags.FlagValues = flags.FLAGS,
    isolate: Callable[[str, Mapping[str, Any], lines.Emit], None] = (
        isolated.run),
) -> None:
  if values.config is None:
    raise errors.UsageError(
        "--config is missing; e.g. --config=configs/bench.py:llama2-7b")
  config = json.loads(values.config.to_json_best_effort())
  settings.check(config)
  parts = blocks.names(config["parts"])
  for part in parts:
    errors.choose("parts", part, dict(PARTS))
  stamp = {
      "time": datetime.datetime.now(datetime.UTC).isoformat(
          timespec="seconds"),
      "commit": workdir.git_commit(), "command": shlex.join(
          ["python", "-m", "experiments.bench", *sys.argv[1:]])}
  shares, show = lines.Shares(), table.Table(
      lambda text: print(text, flush=True))
  # Opened before minutes of work, to tell that it cannot be.
  output = open(values.output, "a") if values.output else None  # noqa: SIM115

  def emit(line: lines.Line) -> None:
    line = shares(line)
    show(line)
    if output is not None:
      output.write(json.dumps(line | stamp) + "\n")
      output.flush()

  try:
    for part in parts:
      run = PARTS[part]
      if run is None:
        isolate(part, config, emit)
      else:
        run(config, emit)
    if values.peers:
      peers.run(values.peers, config, emit)
  finally:
    if output is not None:
      output.close()


if __name__ == "__main__":
  define_flags()
  # The device is for the parts: this process must not hold its memory.
  jax.config.update("jax_platforms", "cpu")
  cli.run(main)
