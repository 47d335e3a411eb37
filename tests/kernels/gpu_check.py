"""Kernel against plain XLA on a GPU: bits, and rates of device memory.

    python -m tests.kernels.gpu_check

Prints one JSON object a line. Not collected by pytest, whose machines have no
GPU.
"""

from __future__ import annotations

import functools
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.kernels import dequantise
from lora_jax.kernels import plain
from lora_jax.quant import fp4
from lora_jax.quant import int4
from lora_jax.quant import nf4
from tests.quant import reference

FORMATS = {"nf4": nf4.NF4, "fp4": fp4.FP4, "int4": int4.Int4,
           "int4_affine": int4.Int4Affine}
SHAPES = [(576, 1536), (4096, 4096), (4096, 11008), (8192, 28672)]
BLOCK = 64
BYTES = 2**29  # Of weights read and written by one call, past the cache.


def stored(name: str, layers: int, rows: int, columns: int):
  """Random codes and statistics on the device; one scale is zero, one NaN."""
  keys = jax.random.split(jax.random.key(rows + columns), 3)
  blocks = (layers, rows // BLOCK, columns)
  scales = jax.random.uniform(keys[1], blocks, minval=1e-4)
  scales = scales.at[:, 0, 0].set(0.0).at[:, 0, 1].set(jnp.nan)
  named = {"scales": scales}
  if name == "int4_affine":
    named["minimums"] = -jax.random.uniform(keys[2], blocks)
  codes = jax.random.bits(keys[0], (layers, rows // 2, columns), jnp.uint8)
  return codes, named


def expected(name, codes, named, dtype) -> np.ndarray:
  """numpy's, for one layer."""
  host = {k: np.asarray(v[0]) for k, v in named.items()}
  blocks = codes.shape[1] * 2 // BLOCK
  nibbles = np.asarray(codes[0]).reshape(blocks, BLOCK // 2, -1)
  nibbles = np.concatenate([nibbles & 15, nibbles >> 4], axis=1)
  table = reference.TABLES.get(name, np.arange(16, dtype=np.float32))
  values = table[nibbles] * host["scales"][:, None]
  if "minimums" in host:
    values = values + host["minimums"][:, None]
  return values.reshape(-1, codes.shape[-1]).astype(dtype)


def differing(a: np.ndarray, b: np.ndarray) -> int:
  """How many values differ in a bit; every NaN is the same, every zero too
  (FP4 has two, and the reference's table one)."""
  bits = np.uint16 if a.dtype.itemsize == 2 else np.uint32
  x, y = a.astype(np.float32), b.astype(np.float32)
  same = (np.isnan(x) & np.isnan(y)) | ((x == 0) & (y == 0))
  return int(((a.view(bits) != b.view(bits)) & ~same).sum())


def seconds(run, codes, named) -> float:
  """Median of one call over all layers, launch and wait included."""
  jax.block_until_ready(run(codes, named))
  times = []
  for _ in range(7):
    start = time.perf_counter()
    outs = [run(codes, named) for _ in range(4)]
    jax.block_until_ready(outs)
    times.append((time.perf_counter() - start) / 4)
    del outs
  return statistics.median(times)


def main() -> None:
  print(json.dumps({"device": jax.devices()[0].device_kind,
                    "jax": jax.__version__}))
  for rows, columns in SHAPES:
    for name, cls in FORMATS.items():
      form = plain.Format(cls.decode, BLOCK, 2, cls.levels())
      for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        small = rows * columns < 2**22
        if dtype != jnp.bfloat16 and not small and name != "nf4":
          continue
        runs = {
            backend: jax.jit(functools.partial(
                dequantise.dequantise, form=form, dtype=dtype,
                backend=backend))
            for backend in ("xla", "mosaic_gpu")}
        codes, named = stored(name, 1, rows, columns)
        got = {b: np.asarray(run(codes, named)[0]) for b, run in runs.items()}
        row = {"shape": [rows, columns], "format": name,
               "dtype": jnp.dtype(dtype).name,
               "differing_from_xla": differing(got["mosaic_gpu"], got["xla"]),
               "nan": int(np.isnan(np.float32(got["mosaic_gpu"])).sum())}
        if rows * columns <= 2**24:
          want = expected(name, codes, named, dtype)
          row["differing_from_numpy"] = differing(got["mosaic_gpu"], want)
        if name in ("nf4", "int4") and dtype == jnp.bfloat16:
          each = rows * columns * (0.5 + jnp.dtype(dtype).itemsize
                                   + 4 / BLOCK)
          layers = max(1, round(BYTES / each))
          codes, named = stored(name, layers, rows, columns)
          row["layers"] = layers
          for backend, run in runs.items():
            row[f"{backend}_gb_per_s"] = round(
                layers * each / seconds(run, codes, named) / 1e9)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
  main()
