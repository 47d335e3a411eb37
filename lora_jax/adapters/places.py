"""Trained coefficients at a few places of a transformed weight.

  Delta W = s R_i D R_o^T          [i, o]

where D is zero but for n trained coefficients, and the columns of R_i and R_o
are fixed waves. No second `[i, o]` matrix is made: x is taken apart (x R_i),
n of its components are weighted and moved to other places, and what stands
there is put together (R_o^T). FourierFT and WaveFT are the two of this kind.

The places are the first n of a random permutation of the weight's o i entries,
by a seed: the same in all modules of one shape, and neither trained nor saved.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses

import jax.numpy as jnp
import numpy as np

from lora_jax import errors
from lora_jax import quant
from lora_jax import struct
from lora_jax import types
from lora_jax.adapters import base
from lora_jax.adapters import torch_random

# What R_i^T x is, by kind of wave (FourierFT has cosines and sines).
Parts = tuple[types.Array, ...]


@struct.dataclass
class Places(base.Adapter):
  """What all modules share.

  Attributes:
    rows: by target, `[n]` int32, the places' wave of the output.
    columns: by target, `[n]` int32, their wave of the input.
  """

  rows: Mapping[str, types.Array] = base.frozen()
  columns: Mapping[str, types.Array] = base.frozen()

  def to_peft(self, embedding=False):
    return {}

  def size(self) -> int:
    return 0


@struct.dataclass
class Coefficients(base.Adapter):
  """Attributes:

    spectrum: `[n]`.
    scale: `[]`, s.
    rank: `[]` int32, 0: not adapted.
    target: of the places.
    rows, columns: `[n]`, while it is used; see `Places`.
  """

  spectrum: types.Array = base.trained(None)
  scale: types.Array = base.frozen()
  rank: types.Array = base.frozen()
  target: str = base.static(default="")
  rows: types.Array = base.frozen(default=None)
  columns: types.Array = base.frozen(default=None)

  def analysis(self, x: types.Array) -> Parts:
    """R_i^T x, parts `[..., m]` for x `[..., i]`."""
    raise NotImplementedError

  def synthesis(self, parts: Parts, size: int) -> types.Array:
    """R_o of parts `[..., m]`, `[..., o]` for o = size."""
    raise NotImplementedError

  def waves(self, size: int) -> int:
    """m, of an axis of that size."""
    raise NotImplementedError

  def delta(self, i: int, o: int) -> types.Array:
    """Delta W without s, `[i, o]` float32."""
    raise NotImplementedError

  def bound(self, shared):
    return dataclasses.replace(
        self, rows=shared.rows[self.target],
        columns=shared.columns[self.target])

  @property
  def values(self):
    return self.active(self.scale * self.spectrum, 0.0)

  def apply(self, x, weight, noise=None):
    del noise
    o = weight.shape[-1]

    def moved(part):
      # In float32, in which the gradient is summed over tokens.
      taken = self.values * part[..., self.columns].astype(jnp.float32)
      empty = jnp.zeros((*x.shape[:-1], self.waves(o)), jnp.float32)
      return empty.at[..., self.rows].add(taken).astype(x.dtype)

    parts = tuple(moved(part) for part in self.analysis(x))
    return quant.matmul(x, weight) + self.synthesis(parts, o)

  def merge(self, weight):
    scaled = dataclasses.replace(self, spectrum=self.values)
    return quant.dequantize(weight, jnp.float32) + scaled.delta(
        *weight.shape[-2:])


def draw(
    shapes: Mapping[str, tuple[int, ...]], count: int, seed: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """(row of o, column of i) of every place by target, as PEFT draws them.

  Args:
    shapes: `(i, o)` by target.
    count: n.
    seed: of the permutation.

  Raises:
    errors.UsageError: if a weight has fewer entries than that.
  """
  found = {}
  for i, o in set(shapes.values()):
    if not 1 <= count <= i * o:
      raise errors.UsageError(
          f"adapter.options.n_frequency={count} is out of range; use an "
          f"integer from 1 to {i * o}, the entries of a {i} x {o} weight")
    places = torch_random.Generator(seed).randperm(i * o, first=count)
    found[i, o] = places // i, places % i
  return {name: found[shape[0], shape[1]] for name, shape in shapes.items()}


def shared(
    places: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Places:
  """`Places` of `draw`'s answer."""
  rows, columns = (
      {name: jnp.asarray(pair[k], jnp.int32) for name, pair in places.items()}
      for k in (0, 1))
  return Places(rows=rows, columns=columns)
