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

import jax
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
    rows: by target, `[n]` int32, the places' wave of the output, ascending.
    columns: by target, `[n]` int32, their wave of the input.
    order: by target, `[n]` int32, which coefficient is theirs.
  """

  rows: Mapping[str, types.Array] = base.frozen()
  columns: Mapping[str, types.Array] = base.frozen()
  order: Mapping[str, types.Array] = base.frozen()

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
    rows, columns, order: `[n]`, while it is used; see `Places`.
  """

  spectrum: types.Array = base.trained(None)
  scale: types.Array = base.frozen()
  rank: types.Array = base.frozen()
  target: str = base.static(default="")
  rows: types.Array = base.frozen(default=None)
  columns: types.Array = base.frozen(default=None)
  order: types.Array = base.frozen(default=None)

  def analysis(self, x: types.Array) -> Parts:
    """R_i^T x, parts `[..., m]` for x `[..., i]`."""
    raise TypeError(f"{type(self).__name__} has no transform")

  def synthesis(self, parts: Parts, size: int) -> types.Array:
    """R_o of parts `[..., m]`, `[..., o]` for o = size."""
    raise TypeError(f"{type(self).__name__} has no transform")

  def waves(self, size: int) -> int:
    """m, of an axis of that size."""
    raise TypeError(f"{type(self).__name__} has no transform")

  def delta(self, i: int, o: int) -> types.Array:
    """Delta W, `[i, o]` float32."""
    raise TypeError(f"{type(self).__name__} has no transform")

  def bound(self, shared):
    return dataclasses.replace(self, **{
        name: getattr(shared, name)[self.target]
        for name in ("rows", "columns", "order")})

  @property
  def values(self) -> types.Array:
    """s c of the places in their order, `[n]`."""
    return self.active(self.scale * self.spectrum, 0.0)[self.order]

  def apply(self, x, weight, noise=None):
    del noise
    o = weight.shape[-1]
    # Waves first: what goes from place to place are then whole rows.
    parts = jnp.moveaxis(jnp.stack(self.analysis(x)), -1, 0)
    # In float32, in which the gradient is summed over tokens.
    taken = parts[self.columns].astype(jnp.float32)
    taken *= self.values.reshape(-1, *[1] * x.ndim)
    put = jax.ops.segment_sum(
        taken, self.rows, self.waves(o), indices_are_sorted=True)
    parts = jnp.moveaxis(put, 0, -1).astype(x.dtype)
    return quant.matmul(x, weight) + self.synthesis(tuple(parts), o)

  def merge(self, weight):
    return quant.dequantize(weight, jnp.float32) + self.delta(
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
  """`Places` of (rows, columns) by target, in any order."""
  order = {name: np.argsort(rows, kind="stable")
           for name, (rows, _) in places.items()}

  def sort(k):
    return {name: jnp.asarray(pair[k][order[name]], jnp.int32)
            for name, pair in places.items()}

  return Places(rows=sort(0), columns=sort(1), order={
      name: jnp.asarray(at, jnp.int32) for name, at in order.items()})
