"""numpy references for the tests: loops over blocks, written from the papers.

Nothing here uses the library's layout code; the tables come from
the papers and bitsandbytes, typed in again.
"""

from __future__ import annotations

import numpy as np

NF4 = np.float32([
    -1, -.6961928009986877, -.5250730514526367, -.39491748809814453,
    -.28444138169288635, -.18477343022823334, -.09105003625154495, 0,
    .07958029955625534, .16093020141124725, .24611230194568634,
    .33791524171829224, .44070982933044434, .5626170039176941,
    .7229568362236023, 1])
FP4 = np.float32([s * m / 12 for s in (1, -1)
                  for m in (0, .0625, 8, 12, 4, 6, 2, 3)])
TABLES = {"nf4": NF4, "fp4": FP4, "int4": np.arange(-8, 8, dtype=np.float32)}


WHOLE_BYTES = ("int8", "llm_int8")


def blocks(rows: int, size: int):
  """Slices of the rows of each block."""
  return [slice(r, min(r + size, rows)) for r in range(0, rows, size)]


def nibbles(packed: np.ndarray, size: int) -> np.ndarray:
  """bytes `[i / 2, o]` -> codes `[i, o]`."""
  packed = np.asarray(packed)
  rows = 2 * packed.shape[0]
  codes = np.zeros((rows, packed.shape[1]), np.uint8)
  for rows_of in blocks(rows, size):
    half = (rows_of.stop - rows_of.start) // 2
    for r in range(half):
      byte = packed[rows_of.start // 2 + r]
      codes[rows_of.start + r] = byte % 16
      codes[rows_of.start + half + r] = byte // 16
  return codes


def unnest(x, table: np.ndarray) -> np.ndarray:
  """Statistics `[q, o]` of an array or of nested codes: multiply, then add."""
  if not hasattr(x, "nested_absmax"):
    return np.asarray(x)
  codes = np.asarray(x.codes)
  flat = codes.T.reshape(-1)  # bitsandbytes' order: one output after another.
  scale = np.repeat(np.asarray(x.nested_absmax), 256)[: flat.size]
  product = table[flat] * scale
  values = product + np.float32(x.offset)
  return values.reshape(codes.shape[::-1]).T


def dequantize(name: str, w, table: np.ndarray) -> np.ndarray:
  """float32 `[i, o]` of a two-dimensional quantised weight."""
  scales = unnest(w.scales, table)
  codes = np.asarray(w.codes)
  if name not in WHOLE_BYTES:
    codes = nibbles(codes, w.block_size)
  values = np.zeros(codes.shape, np.float32)
  for n, rows in enumerate(blocks(codes.shape[0], w.block_size)):
    if name in TABLES:
      values[rows] = TABLES[name][codes[rows]] * scales[n]
    elif name == "int8":
      values[rows] = codes[rows].astype(np.float32) * scales[n]
    elif name == "llm_int8":
      product = codes[rows].astype(np.float32) * scales[n]
      values[rows] = product * np.float32(7.874015718698502e-3)
    else:
      product = codes[rows].astype(np.float32) * scales[n]
      values[rows] = product + unnest(w.minimums, table)[n]
  return values


def encode(name: str, w: np.ndarray, size: int):
  """Codes `[i, o]` and statistics `[q, o]`, all of float32 arithmetic."""
  w = np.asarray(w).astype(np.float32)
  codes = np.zeros(w.shape, np.int32)
  scales, minimums = [], []
  tiny = np.finfo(np.float32).tiny
  for rows in blocks(w.shape[0], size):
    block = w[rows]
    peak = np.abs(block).max(0)
    low = block.min(0)
    scale = {
        "nf4": peak, "fp4": peak, "int4": peak * np.float32(1 / 7),
        "int8": peak * np.float32(1 / 127), "llm_int8": peak,
        "int4_affine": (block.max(0) - low) * np.float32(1 / 15)}[name]
    inverse = np.float32(1) / np.maximum(scale, tiny)
    if name in TABLES:
      order = np.argsort(TABLES[name], kind="stable")
      ascending = TABLES[name][order]
      middles = (ascending[1:] + ascending[:-1]) / np.float32(2)
      codes[rows] = order[np.searchsorted(middles, block * inverse)]
    elif name == "int8":
      codes[rows] = np.rint(block * inverse)
    elif name == "llm_int8":
      codes[rows] = np.rint(
          block * (1 / np.maximum(scale, np.float32(1e-30))
                   * np.float32(127)))
    else:
      codes[rows] = np.rint((block - low) * inverse)
    scales.append(scale)
    minimums.append(low)
  return codes, np.stack(scales), np.stack(minimums)
