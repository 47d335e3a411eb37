"""4-bit weights in and out of bitsandbytes' serialised form, on the host.

bitsandbytes flattens `[o, i]` row by row, puts the first of two values into
the high nibble, and lets blocks run on across the ends of rows. Where the
block size divides `i`, no block does, and the two layouts hold the same
numbers: the conversion moves bytes and changes no value.
"""

from __future__ import annotations

from collections.abc import Mapping
import json
from typing import Any

import numpy as np

from lora_jax import errors
from lora_jax.quant import codebook
from lora_jax.quant import double
from lora_jax.quant import dynamic
from lora_jax.quant import fp4
from lora_jax.quant import nf4

TYPES: dict[str, type[codebook.Codebook]] = {"nf4": nf4.NF4, "fp4": fp4.FP4}
_STATE = "weight.quant_state.bitsandbytes__"


def to_bnb(
    w: codebook.Codebook, dtype: str = "float32"
) -> dict[str, np.ndarray]:
  """`weight`, `weight.absmax`, ... as bitsandbytes 0.50 saves a `Linear4bit`.

  Args:
    w: NF4 or FP4 `[i, o]`.
    dtype: what bitsandbytes shall dequantise to, e.g. `"bfloat16"`.

  Returns:
    Arrays by key; prefix the keys with the module's name and a dot.

  Raises:
    errors.UserError: for another format, for a stack of layers, and if the
      block size does not divide `i`.
  """
  names = [name for name, kind in TYPES.items() if isinstance(w, kind)]
  if not names or w.ndim != 2:
    raise errors.UserError(
        f"{type(w).__name__} {list(w.shape)} has no bitsandbytes form; give "
        "one NF4 or FP4 weight [in, out]")
  rows, out = w.shape
  _check_blocks(rows, w.block_size)
  half = w.block_size // 2
  packed = np.asarray(w.codes).reshape(-1, half, out)
  codes = np.concatenate([packed & 15, packed >> 4], axis=1).reshape(rows, out)
  flat = codes.T.reshape(-1)
  state: dict[str, Any] = {
      "quant_type": names[0], "blocksize": w.block_size, "dtype": dtype,
      "shape": [out, rows]}
  tensors = {
      "weight": ((flat[::2] << 4) | flat[1::2])[:, None],
      "weight.quant_map": w.table(),
  }
  absmax = w.scales
  if isinstance(absmax, double.Nested):
    tensors["weight.nested_absmax"] = np.asarray(absmax.nested_absmax)
    tensors["weight.nested_quant_map"] = dynamic.table().copy()
    state |= {"nested_blocksize": double.BLOCK, "nested_dtype": "float32",
              "nested_offset": float(np.asarray(absmax.offset))}
    absmax = absmax.codes
  tensors["weight.absmax"] = np.asarray(absmax).T.reshape(-1)
  tensors[_STATE + names[0]] = np.frombuffer(
      json.dumps(state).encode(), np.uint8).copy()
  return tensors


def from_bnb(tensors: Mapping[str, np.ndarray]) -> codebook.Codebook:
  """The inverse of `to_bnb`; the leaves are numpy arrays.

  The nested map is torch arithmetic that other processors round differently:
  a map within 1e-6 of ours is read as ours.

  Args:
    tensors: arrays by key, without the module's name; `weight` may be stored
      as any type (`bnb_4bit_quant_storage`).

  Returns:
    NF4 or FP4 `[i, o]`.

  Raises:
    errors.UserError: if a tensor is missing or of the wrong size, for other
      tables, and if the block size does not divide `i`.
  """
  kind, state = _state(tensors)
  out, rows = state["shape"]
  size = state["blocksize"]
  _check_blocks(rows, size)
  flat, absmax = _bytes(tensors), _absmax(tensors)
  _check_sizes(flat, absmax, state)
  flat = flat[: rows * out // 2]
  codes = np.stack([flat >> 4, flat & 15], axis=1).reshape(out, rows).T
  low, high = np.split(codes.reshape(-1, size, out), 2, axis=1)
  stored = np.ascontiguousarray(absmax.reshape(out, -1).T)
  scales: double.Statistic = stored
  if "nested_offset" in state:
    scales = _nested(tensors, state, stored)
  return kind(codes=(low | (high << 4)).reshape(rows // 2, out),
              scales=scales, block_size=size)


def aligned(tensors: Mapping[str, np.ndarray]) -> bool:
  """Whether no block crosses the end of a row, so that `from_bnb` reads it.

  Raises:
    errors.UserError: if the tensors hold no 4-bit weight.
  """
  _, state = _state(tensors)
  rows, size = state["shape"][1], state["blocksize"]
  return rows % size == 0 and size % 2 == 0


def values(tensors: Mapping[str, np.ndarray]) -> np.ndarray:
  """The float32 values `[i, o]`, of any block size; equal to bitsandbytes'.

  Args:
    tensors: as `from_bnb` takes them.

  Raises:
    errors.UserError: if a tensor is missing or of the wrong size, or a table
      is not bitsandbytes' own.
  """
  kind, state = _state(tensors)
  out, rows = state["shape"]
  flat, absmax = _bytes(tensors), _absmax(tensors)
  _check_sizes(flat, absmax, state)
  if "nested_offset" in state:
    nested = _nested(tensors, state, absmax)
    block = np.arange(absmax.size) // double.BLOCK
    absmax = dynamic.table()[absmax] * nested.nested_absmax[block]
    absmax = absmax + nested.offset
  codes = np.stack([flat >> 4, flat & 15], axis=1).reshape(-1)[: rows * out]
  scales = np.repeat(absmax, state["blocksize"])[: codes.size]
  return np.ascontiguousarray(
      (kind.table()[codes] * scales).reshape(out, rows).T)


def _state(
    tensors: Mapping[str, np.ndarray]
) -> tuple[type[codebook.Codebook], dict[str, Any]]:
  """The format and the parsed state of a weight, its table checked."""
  names = [name for name in TYPES if _STATE + name in tensors]
  if not names:
    raise errors.UserError(
        f'no "{_STATE}nf4" or "...fp4" among {sorted(tensors)}; give the '
        "tensors of one Linear4bit as bitsandbytes saves them")
  kind = TYPES[names[0]]
  _check_table(tensors, "weight.quant_map", kind.table(), 0.0)
  return kind, json.loads(bytes(np.asarray(_get(tensors, _STATE + names[0]))))


def _bytes(tensors: Mapping[str, np.ndarray]) -> np.ndarray:
  raw = np.ascontiguousarray(_get(tensors, "weight")).reshape(-1)
  return raw.view(np.uint8)


def _absmax(tensors: Mapping[str, np.ndarray]) -> np.ndarray:
  return np.asarray(_get(tensors, "weight.absmax")).reshape(-1)


def _check_sizes(flat: np.ndarray, absmax: np.ndarray,
                 state: dict[str, Any]) -> None:
  out, rows = state["shape"]
  size = -(-rows * out // 2)
  blocks = -(-rows * out // state["blocksize"])
  # A wider storage type pads the last byte.
  if not size <= flat.size < size + 4 or absmax.size != blocks:
    raise errors.UserError(
        f"weight of {flat.size} bytes and weight.absmax of {absmax.size} "
        f"values do not make shape [{out}, {rows}]: {size} and "
        f"{blocks} are needed; fetch the file again")


def _nested(tensors: Mapping[str, np.ndarray], state: dict[str, Any],
            codes: np.ndarray) -> double.Nested:
  if state["nested_blocksize"] != double.BLOCK:
    raise errors.UserError(
        f"nested_blocksize={state['nested_blocksize']} is not "
        f"{double.BLOCK}; dequantise the weight with bitsandbytes first")
  _check_table(tensors, "weight.nested_quant_map", dynamic.table(), 1e-6)
  return double.Nested(
      codes=codes,
      nested_absmax=np.asarray(_get(tensors, "weight.nested_absmax")),
      offset=np.asarray(state["nested_offset"], np.float32))


def _check_blocks(rows: int, size: int) -> None:
  if rows % size:
    raise errors.UserError(
        f"in_features={rows} is not a multiple of the block size {size}: "
        "bitsandbytes' blocks run across the ends of rows and ours do not; "
        "exchange the dequantised weight instead")


def _check_table(tensors: Mapping[str, np.ndarray], key: str,
                 table: np.ndarray, tolerance: float) -> None:
  stored = np.asarray(_get(tensors, key)).reshape(-1)
  if stored.shape != table.shape or np.abs(stored - table).max() > tolerance:
    raise errors.UserError(
        f"{key} is not bitsandbytes' own table; dequantise the weight with "
        "the library that made it")


def _get(tensors: Mapping[str, np.ndarray], key: str) -> np.ndarray:
  if key not in tensors:
    raise errors.UserError(
        f'"{key}" is missing among {sorted(tensors)}; fetch the file again')
  return tensors[key]
