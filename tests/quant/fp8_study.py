"""Whether training in 8 bits ends where bfloat16 does: three seeds of each.

    python -m tests.quant.fp8_study [FOLDER]

Runs `configs/fp8.py` and prints held-out losses, their mean difference to
bfloat16 (the same seeds, hence the same batches) and its standard error.
Runs that FOLDER (runs/fp8) holds already are not repeated.
"""

from __future__ import annotations

import json
import pathlib
import sys

import numpy as np

from configs import fp8 as config_lib
from experiments import run

SEEDS = (0, 1, 2)
MARGIN = 0.01  # Nats a token.


def loss(folder: pathlib.Path, name: str, seed: int) -> float:
  """Held-out nats a token after training."""
  here = folder / f"{name}-{seed}"
  if not (here / "summary.json").exists():
    config = config_lib.get_config(f"matmul={name},seed={seed}")
    resolved = json.loads(config.to_json_best_effort())
    resolved.pop("distributed")
    run.execute(resolved, here)
  return json.loads((here / "summary.json").read_text())["final_eval_loss"]


def main() -> None:
  folder = pathlib.Path(sys.argv[1] if sys.argv[1:] else "runs/fp8")
  lines, plain = [], np.zeros(len(SEEDS))
  for name in ("auto", "fp8", "fp8_tensor"):
    losses = np.asarray([loss(folder, name, seed) for seed in SEEDS])
    if name == "auto":
      plain = losses
    change = losses - plain
    error = change.std(ddof=1) / len(SEEDS) ** 0.5
    verdict = "within" if abs(change.mean()) < MARGIN else "NOT within"
    lines.append(
        f"{name:12}{'  '.join(f'{x:.4f}' for x in losses)}   "
        f"{change.mean():+.4f} +- {error:.4f}, {verdict} {MARGIN}")
    print(lines[-1], flush=True)
  print("\n".join(["", *lines]))


if __name__ == "__main__":
  main()
