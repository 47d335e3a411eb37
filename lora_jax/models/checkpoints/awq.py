"""AWQ (arXiv:2306.00978), in AutoAWQ's "gemm" layout.

  w = scales (q - z)

`qweight` int32 `[i, o / 8]` and `qzeros` int32 `[q, o / 8]` pack along o, and
hold columns 0 2 4 6 1 3 5 7 of every eight in this order, lowest bits first.
"""

from __future__ import annotations

from collections.abc import Mapping
import re
from typing import Any

import numpy as np

from lora_jax import errors
from lora_jax import quant
from lora_jax.models.checkpoints import scheme

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def open_scheme(config: Mapping[str, Any], source: str) -> scheme.Scheme:
  """The scheme of a `quantization_config` whose quant_method is "awq".

  Raises:
    errors.UserError: for a layout or a width that is not read.
  """
  bits = config.get("bits", config.get("w_bit"))
  layout = str(config.get("version") or config.get("format") or "gemm")
  if bits != 4 or layout.lower() != "gemm":
    raise errors.UserError(
        f'{source}: quantization_config: bits={bits}, version="{layout}" of '
        'AWQ is unsupported; supported: bits=4, version="gemm"')
  return scheme.Scheme(
      label="awq, 4 bits", suffix=re.compile("qweight|qzeros|scales"),
      mark=re.compile("qweight"), decode=decode)


def decode(parts: scheme.Parts) -> quant.QuantizedArray | np.ndarray:
  """The weight `[i, o]` of a module's tensors; see `scheme.groups`.

  Raises:
    errors.UserError: if a tensor is missing, or the shapes do not agree.
  """
  scales = scheme.get(parts, "scales", 2)
  codes = _columns(scheme.get(parts, "qweight", 2))
  zeros = _columns(scheme.get(parts, "qzeros", 2))
  index = scheme.in_turn(codes.shape[0], scales.shape[0])
  return scheme.groups(codes, zeros, scales, index, 4)


def _columns(packed: np.ndarray) -> np.ndarray:
  codes = scheme.bitstream(packed, 4).reshape(packed.shape[0], -1, 8)
  columns = np.empty_like(codes)
  columns[..., ORDER] = codes
  return columns.reshape(packed.shape[0], -1)
