"""What several methods are made of: draws, padded ranks, dense changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import types


def uniform(key: jax.Array, shape: tuple[int, ...], fan: Any) -> jax.Array:
  """U(-1/sqrt(fan), 1/sqrt(fan)), what `kaiming_uniform(a=sqrt(5))` gives.

  Args:
    key: PRNG key.
    shape: of the result, float32.
    fan: inputs of what is drawn; may be traced, and 0 counts as 1.
  """
  bound = jnp.maximum(fan, 1) ** -0.5
  return bound * jax.random.uniform(key, shape, jnp.float32, -1, 1)


def used(width: int, rank: types.Array) -> jax.Array:
  """1 for the first `rank` of `width`, 0 for the padding, `[width]`."""
  return (jnp.arange(width) < rank).astype(jnp.float32)


def widened(x: types.Array, axis: int, width: int) -> jax.Array:
  """`x` as float32, padded with zeros to `width` along `axis`."""
  x = jnp.asarray(x, jnp.float32)
  pads = [(0, 0)] * x.ndim
  pads[axis] = (0, width - x.shape[axis])
  return jnp.pad(x, pads)


def dense(
    x: types.Array, change: Callable[..., jax.Array], *parts: types.Tree
) -> jax.Array:
  """x D `[..., o]` in x's dtype for D = `change(*parts)` `[i, o]` float32.

  The backward pass makes D again: kept, it would be a weight in memory for
  every projection.
  """

  def product(x, *parts):
    return x @ change(*parts).astype(x.dtype)

  return jax.checkpoint(product)(x, *parts)
