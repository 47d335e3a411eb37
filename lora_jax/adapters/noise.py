"""Dropout's randomness."""

from __future__ import annotations

import dataclasses
import zlib

import jax
import jax.numpy as jnp

from lora_jax import struct
from lora_jax import types


@struct.dataclass
class Noise:
  """Counter-based randomness that packing and sharding cannot move.

  Every token's mask depends on (seed, step, layer, target, global example
  id, position in the example) and on nothing else: not on the row a token
  was packed into, nor on the micro-batch or device it landed on.

  Attributes:
    key: PRNG key, already folded with the step.
    example_ids: `[b, t]` int32.
    positions: `[b, t]` int32.
    neftune: static; alpha of the noise on embeddings, 0 for none.
  """

  key: jax.Array
  example_ids: types.Array
  positions: types.Array
  neftune: float = struct.field(pytree_node=False, default=0.0)

  def at_layer(self, layer: types.Array) -> Noise:
    return dataclasses.replace(
        self, key=jax.random.fold_in(self.key, layer))

  def for_target(self, target: str) -> Noise:
    # A digest of the name, so that adding a target moves no other's mask.
    index = zlib.crc32(target.encode()) & 0x7FFFFFFF
    return dataclasses.replace(
        self, key=jax.random.fold_in(self.key, index))

  def dropout(self, x: types.Array, rate: types.Array) -> types.Array:
    """Inverted dropout of `x [b, t, i]` at a traced `rate []`."""
    keep = self._drawn(jax.random.uniform, x) >= rate
    return jnp.where(keep, x / (1.0 - rate).astype(x.dtype), 0)

  def normal(self, x: types.Array) -> types.Array:
    """N(0, 1), in the shape and type of `x [b, t, i]`."""
    return self.for_target("normal")._drawn(jax.random.normal, x).astype(
        x.dtype)

  def uniform(self, x: types.Array) -> types.Array:
    """U(-1, 1), float32, in the shape of `x [b, t, i]`."""
    return self.for_target("uniform")._drawn(
        lambda key, shape: jax.random.uniform(key, shape, minval=-1.0), x)

  def logistic(self, x: types.Array) -> types.Array:
    """Logistic(0, 1), in the shape and type of `x [b, t, i]`."""
    return self.for_target("logistic")._drawn(jax.random.logistic, x).astype(
        x.dtype)

  def of_examples(self) -> Noise:
    """Noise that all tokens of an example have alike."""
    return dataclasses.replace(self, positions=0 * self.positions)

  def _drawn(self, draw, x):
    def one(example, position):
      key = jax.random.fold_in(self.key, example)
      key = jax.random.fold_in(key, position)
      return draw(key, x.shape[-1:])

    return jax.vmap(jax.vmap(one))(self.example_ids, self.positions)
