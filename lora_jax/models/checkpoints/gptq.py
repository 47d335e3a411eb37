"""GPTQ (arXiv:2210.17323), as AutoGPTQ and GPTQModel store it.

  w[r] = scales[g] (q[r] - z[g]),   g = g_idx[r]

`qweight` int32 `[i b / 32, o]` packs b-bit codes along i, `qzeros` int32
`[q, o b / 32]` along o, both lowest bits first; `scales` `[q, o]`, `g_idx`
int32 `[i]`. Version 1 stores z - 1, "gptq_v2" stores z.
"""

from __future__ import annotations

from collections.abc import Mapping
import functools
import re
from typing import Any

import numpy as np

from lora_jax import errors
from lora_jax import quant
from lora_jax.models.checkpoints import scheme

BITS = (2, 3, 4, 8)
_OFFSET = {"gptq": 1, "gptq_v2": 0}


def open_scheme(config: Mapping[str, Any], source: str) -> scheme.Scheme:
  """The scheme of a `quantization_config` whose quant_method is "gptq".

  Raises:
    errors.UserError: for a checkpoint format or a width that is not read.
  """
  bits = config.get("bits")
  if bits not in BITS:
    raise errors.UserError(
        f"{source}: quantization_config: bits={bits!r} of GPTQ is "
        f"unsupported; supported: {', '.join(map(str, BITS))}")
  kind = config.get("checkpoint_format") or config.get("format") or "gptq"
  if kind not in _OFFSET:
    raise errors.UserError(
        f'{source}: quantization_config: checkpoint_format="{kind}" is '
        f"unsupported; supported: {', '.join(_OFFSET)}")
  return scheme.Scheme(
      label=f"{kind}, {bits} bits",
      suffix=re.compile("qweight|qzeros|scales|g_idx"),
      mark=re.compile("qweight"),
      decode=functools.partial(decode, offset=_OFFSET[kind]))


def decode(
    parts: scheme.Parts, offset: int = 1
) -> quant.QuantizedArray | np.ndarray:
  """The weight `[i, o]` of a module's tensors; see `scheme.groups`.

  The width is that of `qweight`: GPTQModel may give each module its own.

  Args:
    parts: by suffix; without `g_idx` the groups follow each other.
    offset: what the stored zeros lack.

  Raises:
    errors.UserError: if a tensor is missing, or the shapes do not agree.
  """
  packed = scheme.get(parts, "qweight", 2)
  scales = scheme.get(parts, "scales", 2)
  packed_zeros = scheme.get(parts, "qzeros", 2)
  number, out = scales.shape
  bits = 32 * packed_zeros.shape[1] // max(out, 1)
  if bits not in BITS or 32 * packed.shape[0] % bits:
    raise errors.UserError(
        f"qweight {list(packed.shape)}, qzeros {list(packed_zeros.shape)} and "
        f"scales {list(scales.shape)} do not belong together; download the "
        "files again")
  codes = scheme.bitstream(packed.T, bits).T
  stored = scheme.bitstream(packed_zeros, bits)
  # z = 0 is stored as -1, whose low bits are all ones.
  zeros = (stored + np.uint8(offset)) & np.uint8(2**bits - 1)
  index = parts.get("g_idx")
  if index is None:
    index = scheme.in_turn(codes.shape[0], number)
  return scheme.groups(codes, zeros, scales, index, bits)
