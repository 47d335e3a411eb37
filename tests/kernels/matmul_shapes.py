"""What `matmul_gpu` and `matmul_peer` multiply, and how they tell."""

from __future__ import annotations

import json

SHAPES = [(4096, 4096), (4096, 11008), (14336, 4096), (8192, 28672)]
BLOCK = 64
BYTES = 2**29  # Of all weights of a shape: ten times the cache.


def packed(shape: tuple[int, int]) -> int:
  """Bytes of a weight's codes."""
  return shape[0] * shape[1] // 2


def weights(shape: tuple[int, int]) -> int:
  """How many of them in a row are timed."""
  return -(-BYTES // packed(shape))


def report(
    path: str | None, shape: tuple[int, int], rows: int, way: str, took: float
) -> None:
  """Prints the seconds of one product, and adds them to the file."""
  rate = packed(shape) / took / 1e9
  print(f"{f'{shape[0]}x{shape[1]}, {rows:2d} rows, {way}':70s} "
        f"{took * 1e6:8.1f} us {rate:6.0f} GB/s", flush=True)
  if path:
    with open(path, "a") as file:
      file.write(json.dumps([[*shape, rows, way], took]) + "\n")


def results(path: str) -> dict[tuple[int, int, int, str], float]:
  """Seconds by rows of the weight, its columns, rows of `x` and way."""
  with open(path) as file:
    return {tuple(key): took for key, took in map(json.loads, file)}
