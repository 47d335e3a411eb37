"""Dequantisation in plain XLA: what the kernels must equal bit for bit."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.kernels import decode as decode_lib
from lora_jax.kernels import exact
from lora_jax.kernels import packing


@dataclasses.dataclass(frozen=True)
class Format:
  """How stored codes become numbers.

  Attributes:
    decode: codes `[n, size, o]` and statistics `[n, 1, o]` by name -> float32
      `[n, size, o]`; what XLA compiles.
    block_size: rows of a block.
    codes_per_byte: 2 or 1.
    levels: the same as `decode` for a kernel: 16 values by code, which are
      multiplied by the statistic "scales", to which "minimums" are added if
      there are any. None if `decode` is something else.
  """

  decode: Callable[[jax.Array, dict[str, jax.Array]], jax.Array]
  block_size: int
  codes_per_byte: int = 2
  levels: decode_lib.Levels | None = None


def dequantise(
    codes: jax.Array,
    statistics: dict[str, jax.Array],
    form: Format,
    dtype: Any,
) -> jax.Array:
  """The weight `[..., i, o]` in `dtype`.

  Args:
    codes: `[..., i / codes_per_byte, o]`.
    statistics: `[..., q, o]` by name.
    form: how they become numbers.
    dtype: of the result.

  Returns:
    What `form.decode` computes in float32, rounded once; equal to numpy's
    multiply-then-add bit for bit, inside jit and scan as well.
  """
  if codes.ndim > 2:
    return jax.vmap(lambda c, s: dequantise(c, s, form, dtype))(
        codes, statistics)
  byte_rows, out = codes.shape
  parts = []
  for span in packing.spans(byte_rows * form.codes_per_byte, form.block_size):
    first = span.row // form.codes_per_byte
    count = span.number * span.size // form.codes_per_byte
    part = codes[first : first + count]
    part = (packing.unpack(part, span.size) if form.codes_per_byte == 2
            else part.reshape(span.number, span.size, -1))
    blocks = slice(span.block, span.block + span.number)
    values = form.decode(
        part, {name: x[blocks, None] for name, x in statistics.items()})
    parts.append(exact.cast(values, dtype).reshape(-1, out))
  return jnp.concatenate(parts)
