"""Blocks along `i`, and two 4-bit codes a byte."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Span(NamedTuple):
  """Neighbouring blocks of one size: `number` of `size` rows from `row` on."""

  block: int
  row: int
  number: int
  size: int


def spans(in_features: int, block_size: int) -> list[Span]:
  """`(576, 128)` -> four blocks of 128, then one of 64; at most two spans."""
  number, tail = divmod(in_features, block_size)
  both = [Span(0, 0, number, block_size),
          Span(number, number * block_size, 1, tail)]
  return [span for span in both if span.number and span.size]


def pack(codes: jax.Array) -> jax.Array:
  """uint8 nibbles `[n, size, o]` -> bytes `[n * size / 2, o]`."""
  n, size, out = codes.shape
  low, high = codes[:, : size // 2], codes[:, size // 2 :]
  return (low | (high << 4)).reshape(n * size // 2, out)


def unpack(packed: jax.Array, size: int) -> jax.Array:
  """bytes `[n * size / 2, o]` -> uint8 nibbles `[n, size, o]`.

  A broadcast shift instead of a concatenation keeps this one loop that XLA
  fuses with whatever follows.
  """
  shift = jnp.asarray([0, 4], jnp.uint8).reshape(1, 2, 1, 1)
  halves = packed.reshape(-1, 1, size // 2, packed.shape[-1]) >> shift
  return (halves & 15).reshape(-1, size, packed.shape[-1])
