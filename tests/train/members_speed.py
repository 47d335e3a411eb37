"""Runs side by side against the same runs in turn, in tokens a second.

  python -m tests.train.members_speed 8 20 bfloat16

Arguments: members, steps, compute type. SmolLM2-135M in NF4, rank 16, 4 x 256
packed tokens each. The first quarter of the steps, at most 5, is not counted;
medians of the others.
"""

from __future__ import annotations

import json
import pathlib
import statistics
import sys
import tempfile
import time

import jax

from experiments import blocks
from lora_jax import adapters as adapters_lib
from lora_jax import api
from lora_jax.api import training as training_lib
from lora_jax.data import dataset as dataset_lib
from lora_jax.data import sources
from lora_jax.train import loop
from lora_jax.train import optim as optim_lib


def speed(folder: pathlib.Path, warm: int) -> float:
  """Median tokens a second of a run's steps after `warm`."""
  lines = [json.loads(x) for x in (folder / "metrics.jsonl").open()]
  return statistics.median(
      x["tokens_per_s"] for x in lines[warm:] if "tokens_per_s" in x)


def main(count: int, steps: int, dtype: str) -> None:
  model = api.load(
      blocks.locate("asset:smollm2-135m-instruct"), quant="nf4", dtype=dtype)
  rows = model.encode(
      sources.read(blocks.locate("asset:alpaca_en_demo")), max_length=2**30)
  rows, _ = dataset_lib.fit(rows, 256, "truncate")
  config = adapters_lib.AdapterConfig(method="lora", rank=16, alpha=32.0)
  warm = min(5, -(-steps // 4))
  with tempfile.TemporaryDirectory() as root:
    def training(name, seed):
      return training_lib.prepare(
          model.adapt(config, seed=seed), rows,
          workdir=pathlib.Path(root) / name, seed=seed, max_length=256,
          config=loop.TrainConfig(steps=steps, batch_size=4),
          optim=optim_lib.OptimConfig(learning_rate=1e-3))

    start = time.perf_counter()
    training("alone", 0).fit()
    alone = time.perf_counter() - start
    start = time.perf_counter()
    training_lib.fit([training(f"{i}", i) for i in range(count)])
    together = time.perf_counter() - start
    one = speed(pathlib.Path(root) / "alone", warm)
    many = sum(speed(pathlib.Path(root) / f"{i}", warm)
               for i in range(count))
  print(f"{jax.devices()[0].device_kind}, {dtype}, {count} members of 4 x 256: "
        f"alone {one:,.0f} tok/s, together {many:,.0f} tok/s, {many / one:.2f} "
        f"times (medians of {steps - warm} steps; {alone:.0f} and "
        f"{together:.0f} s with compiling)")


if __name__ == "__main__":
  main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
