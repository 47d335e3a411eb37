"""Adam with both moments in 8 bits: Dettmers et al. 2022, arXiv:2110.02861.

A block is 256 consecutive values of a flattened parameter. Its moments are
held as 8-bit codes (`quant.dynamic`) of m / max|m| and v / max v, and one
float32 maximum each: 2.03 bytes a parameter where float32 takes 8.

  m = b1 decode(m8) + (1 - b1) g          v = b2 decode(v8) + (1 - b2) g^2
  u = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)
  m8 = encode(m)                          v8 = encode(v)

as bitsandbytes' kernel does (`kOptimizerStatic8bit2StateBlockwise`): the
update is of the moments before they are coded again, a negative m never
becomes 0, and parameters of fewer than 4096 values keep float32 moments.

Codes have their parameter's shape and are cut over a mesh as it is. A layer's
parameter is flattened by itself, so that neither the stack of layers nor the
mesh decides what is in a block.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_jax import trees
from lora_jax import types
from lora_jax.kernels import exact
from lora_jax.quant import dynamic

BLOCK = 256
# Of one layer: below, the moments stay in float32.
MIN_SIZE = 4096
_ZERO = int(np.searchsorted(dynamic.table(), 0.0))


class Adam8bitState(NamedTuple):
  """Trees like the parameters.

  Attributes:
    count: int32, updates done.
    mu: uint8 codes of the first moment, or the moment of a small parameter.
    mu_absmax: float32 maxima of its blocks, see `_blocks`; None where `mu` is
      the moment.
    nu, nu_absmax: likewise of the second moment.
  """

  count: types.Array
  mu: types.Tree
  mu_absmax: types.Tree
  nu: types.Tree
  nu_absmax: types.Tree


def _blocks(shape: tuple[int, ...], stacked: bool) -> tuple[int, ...]:
  """Shape of the maxima of an array's blocks, with as many axes as it has.

  Blocks lie in the order of the flattened array. Where they divide its axes
  no axis is merged with another, so that what is cut stays cut.

    [i, 512]  -> [i, 2]       parts of a row
    [i, 16]   -> [i / 16, 1]  whole rows
    [5, 1000] -> [1, 20]      across rows, the last one padded
    [l, ...]  -> [l, ...]     of each layer, if `stacked`
  """
  *outer, last = shape
  if last % BLOCK == 0:
    return (*outer, last // BLOCK)
  rows = BLOCK // last
  if (BLOCK % last == 0 and len(outer) > stacked and outer[-1] % rows == 0):
    return (*outer[:-1], outer[-1] // rows, 1)
  lead = shape[:stacked]
  number = -(-math.prod(shape[stacked:]) // BLOCK)
  return (*lead, *[1] * (len(shape) - len(lead) - 1), number)


def _quantised(shape: tuple[int, ...], stacked: bool) -> bool:
  return math.prod(shape[stacked:]) >= MIN_SIZE


def _decode(codes, absmax, signed, stacked):
  """float32 of the codes' shape."""
  values = dynamic.decode(codes, signed)
  return _unblocked(
      _blocked(values, absmax.shape, stacked) * absmax[..., None],
      codes.shape, stacked)


def _encode(values, signed, stacked):
  """(codes, absmax)."""
  blocks = _blocked(values, _blocks(values.shape, stacked), stacked)
  absmax = jnp.max(jnp.abs(blocks), axis=-1)
  codes = dynamic.encode(blocks * exact.reciprocal(absmax)[..., None], signed)
  if signed:
    codes = jnp.where((codes == _ZERO) & (blocks < 0), _ZERO - 1, codes)
  return _unblocked(
      codes.astype(jnp.uint8), values.shape, stacked), absmax


def _blocked(x, blocks, stacked):
  """`[..., 256]`, the leading axes those of `_blocks`."""
  if math.prod(blocks) * BLOCK != x.size:
    lead = x.shape[:stacked]
    x = x.reshape(*lead, -1)
    x = jnp.pad(x, [(0, 0)] * len(lead) + [(0, -x.shape[-1] % BLOCK)])
  return x.reshape(*blocks, BLOCK)


def _unblocked(blocks, shape, stacked):
  """The array of `shape` that `_blocked` came from."""
  if blocks.size != math.prod(shape):
    size = math.prod(shape[stacked:])
    blocks = blocks.reshape(*shape[:stacked], -1)[..., :size]
  return blocks.reshape(shape)


def scale_by_adam(
    b1: types.Array, b2: types.Array, eps: types.Array,
    mu_dtype: str = "float32",
) -> optax.GradientTransformation:
  """`optax.scale_by_adam` with 8-bit moments.

  Args:
    b1, b2, eps: Adam's, traced or not.
    mu_dtype: how the first moment of small parameters is stored.
  """

  def init(params):
    stacked = trees.stacked(params)

    def moment(dtype):
      return jax.tree.map(
          lambda p, s: jnp.zeros(
              p.shape, jnp.uint8 if _quantised(p.shape, s) else dtype),
          params, stacked)

    def absmax():
      return jax.tree.map(
          lambda p, s: jnp.zeros(_blocks(p.shape, s), jnp.float32)
          if _quantised(p.shape, s) else None, params, stacked)

    return Adam8bitState(
        count=jnp.int32(0), mu=moment(mu_dtype), mu_absmax=absmax(),
        nu=moment(jnp.float32), nu_absmax=absmax())

  def update(updates, state, params=None):
    del params
    count = optax.safe_increment(state.count)
    structure: Any = jax.tree.structure(updates)
    leaves = jax.tree.leaves(updates)
    flat = [structure.flatten_up_to(tree) for tree in (
        trees.stacked(updates), state.mu, state.mu_absmax, state.nu,
        state.nu_absmax)]
    rows = [one(count, *row) for row in zip(leaves, *flat)]
    found = [structure.unflatten(column) for column in zip(*rows)]
    return found[0], Adam8bitState(count, *found[1:])

  def one(count, g, stacked, mu, mu_absmax, nu, nu_absmax):
    small = mu_absmax is None
    dtype = mu.dtype
    if not small:
      mu = _decode(mu, mu_absmax, True, stacked)
      nu = _decode(nu, nu_absmax, False, stacked)
    mu = b1 * mu + (1 - b1) * g
    nu = b2 * nu + (1 - b2) * g**2
    m = mu / (1 - b1**count)
    v = nu / (1 - b2**count)
    step = m / (jnp.sqrt(v) + eps)
    if small:
      return step, mu.astype(dtype), None, nu, None
    return step, *_encode(mu, True, stacked), *_encode(nu, False, stacked)

  return optax.GradientTransformation(init, update)
