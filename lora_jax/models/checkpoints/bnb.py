"""bitsandbytes: NF4 and FP4 in 4 bits, LLM.int8 in 8."""

from __future__ import annotations

from collections.abc import Mapping
import re
from typing import Any

import numpy as np

from lora_jax import errors
from lora_jax import quant
from lora_jax.models.checkpoints import scheme
from lora_jax.quant import bnb
from lora_jax.quant import llm_int8


def open_scheme(config: Mapping[str, Any], source: str) -> scheme.Scheme:
  """The scheme of a `quantization_config` of bitsandbytes.

  Raises:
    errors.UserError: if it is neither of 4 nor of 8 bits.
  """
  if config.get("load_in_4bit"):
    return scheme.Scheme(
        label=f"bitsandbytes, {config.get('bnb_4bit_quant_type', 'fp4')}",
        suffix=re.compile(r"weight(?:\..+)?"),
        mark=re.compile(r"weight\.quant_state\..+"), decode=decode_4bit)
  if config.get("load_in_8bit"):
    return scheme.Scheme(
        label="bitsandbytes, llm_int8",
        suffix=re.compile("weight|SCB|weight_format"),
        mark=re.compile("SCB"), decode=decode_8bit)
  raise errors.UserError(
      f"{source}: quantization_config has neither load_in_4bit nor "
      "load_in_8bit; give a checkpoint that bitsandbytes quantised")


def decode_4bit(parts: scheme.Parts) -> quant.QuantizedArray | np.ndarray:
  """NF4 or FP4 `[i, o]`, or its float32 values where blocks cross rows.

  Raises:
    errors.UserError: see `quant.bnb.from_bnb`.
  """
  if bnb.aligned(parts):
    return bnb.from_bnb(parts)
  return bnb.values(parts)


def decode_8bit(parts: scheme.Parts) -> quant.QuantizedArray:
  """LLM.int8 `[i, o]`.

  Raises:
    errors.UserError: if a tensor is missing, of another type or size, or in a
      layout of old GPU kernels.
  """
  weight, absmax = scheme.get(parts, "weight", 2), scheme.get(parts, "SCB", 1)
  layout = int(np.asarray(parts.get("weight_format", 0)))
  if weight.dtype != np.int8 or absmax.shape != weight.shape[:1] or layout:
    raise errors.UserError(
        f"weight of {weight.dtype} {list(weight.shape)}, SCB "
        f"{list(absmax.shape)} and weight_format {layout} are not int8 "
        "[o, i], [o] and 0 (row-major); save the model again with "
        "bitsandbytes 0.45 or later")
  return llm_int8.LLMInt8(
      codes=np.ascontiguousarray(weight.T),
      scales=absmax[None].astype(np.float32), block_size=quant.WHOLE)
