"""The safetensors file format, written a tensor at a time.

The library's own writer wants all tensors of a file in memory, and puts the
metadata in a random order, so that equal content gives unequal bytes.

  8 bytes   length of the header, little endian
  header    JSON: name -> dtype, shape, data_offsets; padded with spaces
  data      the tensors, in the header's order
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import json
import math
import pathlib
import struct
from typing import Any

import jax.numpy as jnp
import numpy as np

# The format's names of the types that can be written.
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
# Those of what is no weight.
INDICES = {"int16": "I16", "int32": "I32", "int64": "I64", "uint8": "U8",
           "bool": "BOOL"}


def write(
    path: pathlib.Path,
    shapes: Mapping[str, tuple[int, ...]],
    values: Iterable[tuple[str, np.ndarray]],
    dtype: str | Mapping[str, str],
    metadata: Mapping[str, str],
) -> None:
  """Writes one file; equal arguments give equal bytes.

  Args:
    path: the file.
    shapes: of each tensor by name, in the order of the file.
    values: (name, array in `dtype`) in the same order; taken one by one, no
      more than `shapes` names.
    dtype: a key of `DTYPES` or `INDICES`; or one for every name.
    metadata: texts by name.

  Raises:
    ValueError: if `values` do not follow `shapes`.
    OSError: if the file cannot be written.
  """
  codes = DTYPES | INDICES
  dtypes = dict.fromkeys(shapes, dtype) if isinstance(dtype, str) else dtype
  header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
  at = 0
  for name, shape in shapes.items():
    past = at + jnp.dtype(dtypes[name]).itemsize * math.prod(shape)
    header[name] = {"dtype": codes[dtypes[name]], "shape": list(shape),
                    "data_offsets": [at, past]}
    at = past
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  with open(path, "wb") as file:
    file.write(struct.pack("<Q", len(text)) + text)
    # `shapes` first: zip must not take a value that belongs to the next file.
    for (name, shape), (found, value) in zip(shapes.items(), values):
      if (found, value.shape, value.dtype.name) != (
          name, shape, dtypes[name]):
        raise ValueError(
            f"{found} {value.dtype}{value.shape} came in place of {name} "
            f"{dtypes[name]}{shape}")
      file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
      at -= value.nbytes
  if at:
    raise ValueError(f"{path}: {at} bytes of tensors are missing")
