"""How fast bitsandbytes multiplies few rows by a 4-bit weight, on a GPU.

A process of its own (`python -m tests.kernels.matmul_peer`), which
`matmul_gpu` starts: torch and jax would share out the memory. Both the product
of one row, `functional.gemv_4bit`, and what its layers call, `matmul_4bit`, of
which newer versions have other kernels.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
import time
from typing import Any

from tests.kernels import matmul_shapes as shapes_lib


def milliseconds(torch: Any, run) -> float:
  """Of `run`, by events, in a CUDA graph if possible: without Python's time."""
  stream = torch.cuda.Stream()
  with torch.cuda.stream(stream):
    for _ in range(2):
      run()
  torch.cuda.synchronize()
  graph = torch.cuda.CUDAGraph()
  try:
    with torch.cuda.graph(graph):
      run()
    replay = graph.replay
  except RuntimeError as error:
    print(f"no CUDA graph, so with Python's time: {error}"[:200], flush=True)
    replay = run
  replay()
  times = []
  for _ in range(5):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    replay()
    end.record()
    torch.cuda.synchronize()
    times.append(start.elapsed_time(end))
  return statistics.median(times)


def ways(shape: tuple[int, int]):
  """Yields a way's name, its rows and the seconds of one product."""
  import bitsandbytes as bnb
  import torch
  functional = bnb.functional
  ins, columns = shape
  packed, state = functional.quantize_4bit(
      torch.randn(columns, ins, dtype=torch.bfloat16, device="cuda"),
      blocksize=shapes_lib.BLOCK, quant_type="nf4", compress_statistics=False)
  weights = []
  for _ in range(shapes_lib.weights(shape)):
    own = copy.copy(state)
    own.absmax = state.absmax.clone()
    weights.append((packed.clone(), own))
  for way, one, rows in [
      ("gemv_4bit", lambda x, w, s: functional.gemv_4bit(x, w.t(), state=s), 1),
      ("matmul_4bit", lambda x, w, s: bnb.matmul_4bit(x, w.t(), s), 1),
      ("matmul_4bit", lambda x, w, s: bnb.matmul_4bit(x, w.t(), s), 16)]:
    x = torch.randn(rows, ins, dtype=torch.bfloat16, device="cuda")

    def run(one=one, x=x):
      for weight in weights:
        one(x, *weight)

    with torch.no_grad():
      yield way, rows, functools.partial(milliseconds, torch, run)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--results", help="a file to add lines of JSON to")
  parser.add_argument("--until", type=float, default=float("inf"),
                      help="seconds of the epoch when nothing new begins")
  flags = parser.parse_args()
  try:
    import bitsandbytes as bnb
  except Exception as error:  # Its libraries may be others than the machine's.
    print(f"no bitsandbytes: {error}"[:200])
    return
  print(f"bitsandbytes {bnb.__version__}", flush=True)
  for shape in shapes_lib.SHAPES:
    try:
      for way, rows, measure in ways(shape):
        if time.time() > flags.until:
          return
        took = measure() / 1e3 / shapes_lib.weights(shape)
        shapes_lib.report(flags.results, shape, rows, way, took)
    except Exception as error:  # Say so, and go on.
      line = f"{type(error).__name__}: {error}".splitlines()[0]
      print(f"{shape}: FAILED {line}"[:200], flush=True)


if __name__ == "__main__":
  main()
