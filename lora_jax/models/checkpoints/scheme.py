"""What a method of quantised checkpoints tells, and arithmetic they share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import re

import numpy as np

from lora_jax import errors
from lora_jax import quant
from lora_jax.quant import grouped

Parts = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Scheme:
  """How the quantised weights of a checkpoint are stored.

  Attributes:
    label: what messages call it, e.g. "gptq, 4 bits".
    suffix: of the stored tensors of a quantised module.
    mark: of the suffix that only a quantised module has.
    decode: tensors of a module by suffix -> its weight `[i, o]`, quantised
      with numpy leaves; or float32 `[i, o]`, of the same values, where no
      format of ours can hold it.
  """

  label: str
  suffix: re.Pattern[str]
  mark: re.Pattern[str]
  decode: Callable[[Parts], quant.QuantizedArray | np.ndarray]

  def parts(self, names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Stored names, by suffix, of every quantised weight.

      ["a.qweight", "a.scales", "b.weight"]
      -> {"a.weight": {"qweight": "a.qweight", "scales": "a.scales"}}
    """
    modules: dict[str, dict[str, str]] = {}
    for name in names:
      found = re.fullmatch(rf"(.+?)\.({self.suffix.pattern})", name)
      if found:
        modules.setdefault(found[1], {})[found[2]] = name
    return {f"{module}.weight": stored for module, stored in modules.items()
            if any(self.mark.fullmatch(suffix) for suffix in stored)}


def get(parts: Parts, key: str, ndim: int | None = None) -> np.ndarray:
  """A stored tensor.

  Raises:
    errors.UserError: if it is missing, or has not `ndim` axes.
  """
  if key not in parts:
    raise errors.UserError(
        f'"{key}" is missing among {sorted(parts)}; download the files again')
  if ndim is not None and parts[key].ndim != ndim:
    raise errors.UserError(
        f"{key} has shape {list(parts[key].shape)}; {ndim} axes are needed")
  return parts[key]


def bitstream(words: np.ndarray, bits: int) -> np.ndarray:
  """Codes packed along the last axis, lowest bits first.

  Of 3 bits too, whose codes 10 and 21 of 32 run across two words.

  Args:
    words: int32 `[..., n]`.
    bits: of a code, 1 to 8.

  Returns:
    uint8 `[..., 32 n / bits]`.
  """
  data = np.ascontiguousarray(words).view(np.uint8)
  if bits == 8:
    return data
  if bits == 4:
    return np.stack([data & 15, data >> 4], -1).reshape(*data.shape[:-1], -1)
  flags = np.unpackbits(data, axis=-1, bitorder="little")
  weights = np.uint8(1) << np.arange(bits, dtype=np.uint8)
  grouped_flags = flags.reshape(*flags.shape[:-1], -1, bits)
  return (grouped_flags * weights).sum(-1, dtype=np.uint8)


def groups(
    codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray,
    index: np.ndarray, bits: int,
) -> quant.QuantizedArray | np.ndarray:
  """`w[r] = scales[g] * (codes[r] - zeros[g])` with `g = index[r]`.

  Args:
    codes: uint8 `[i, o]`.
    zeros: uint8 `[q, o]`.
    scales: float `[q, o]`.
    index: group of each row, int `[i]`.
    bits: of a code.

  Returns:
    A `Grouped`; a `Grouped8` for more than 4 bits, or odd groups; float32
    values where the groups are of unequal size.

  Raises:
    errors.UserError: if the shapes do not agree.
  """
  rows, out = codes.shape
  number = scales.shape[0]
  if (zeros.shape != scales.shape or scales.shape[1] != out
      or index.shape != (rows,) or index.min() < 0 or index.max() >= number):
    raise errors.UserError(
        f"codes {list(codes.shape)}, zeros {list(zeros.shape)}, scales "
        f"{list(scales.shape)} and group indices {list(index.shape)} do not "
        "belong together; download the files again")
  size = int(np.bincount(index).max())
  order = np.argsort(index, kind="stable")
  wide = bits > 4 or rows % 2 or size % 2
  if (index[order] != np.arange(rows) // size).any():
    steps = (codes.astype(np.int32) - zeros[index]).astype(np.float32)
    values = steps * scales[index].astype(np.float32)
    return values.astype(scales.dtype).astype(np.float32)
  where = None
  if (index[:-1] > index[1:]).any():
    codes = codes[order]
    where = np.argsort(order).astype(np.int32)
  kind = grouped.Grouped8 if wide else grouped.Grouped
  return kind(codes=codes if wide else _nibbles(codes, size), scales=scales,
              zeros=zeros, rows=where, block_size=size)


def in_turn(rows: int, number: int) -> np.ndarray:
  """Group of each row, int `[i]`, of equal groups that follow each other.

  Raises:
    errors.UserError: if there are not as many rows in each.
  """
  if not number or rows % number:
    raise errors.UserError(
        f"{rows} rows do not make {number} equal groups; download the files "
        "again")
  return np.arange(rows) // (rows // number)


def _nibbles(codes: np.ndarray, size: int) -> np.ndarray:
  """`quant.base.pack` of every block, in numpy."""
  rows, out = codes.shape
  packed = np.empty((rows // 2, out), np.uint8)
  whole = rows // size * size
  for start, stop, block in ((0, whole, size), (whole, rows, rows - whole)):
    if start < stop:
      low, high = np.split(
          codes[start:stop].reshape(-1, block, out), 2, axis=1)
      packed[start // 2 : stop // 2] = (low | (high << 4)).reshape(-1, out)
  return packed
