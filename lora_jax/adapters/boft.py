"""BOFT: butterfly factors of an orthogonal matrix (Liu et al., 2311.06243).

  h = ((x R_m ... R_1) W0) * s + bias,  R_j = P_j blockdiag(B_j1, ...) P_j'

with B_jk `[b, b]` the Cayley transform (I - Q) (I + Q)^-1 of the skew part of
what is trained, P_j the permutation that brings the j-th butterfly's partners
side by side, and s `[o]` scales of the outputs. B_jk = I and s = 1 at init.
Dropout takes one of the factors in a step, and I for a share `rate` of its
blocks.

Hugging Face PEFT has one factor (m = 1) wherever its CUDA extension is
missing, whatever its config says.

Trainable parameters: m i b + o a matrix, as in PEFT (less than half are free).
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import errors
from lora_jax import quant
from lora_jax import struct
from lora_jax import types
from lora_jax.adapters import base
from lora_jax.adapters import config as config_lib
from lora_jax.adapters import method
from lora_jax.adapters import noise as noise_lib
from lora_jax.adapters import oft


@dataclasses.dataclass(frozen=True)
class Options:
  """Attributes:

    block_size: b; 0: by `blocks`.
    blocks: i / b, if block_size is 0.
    factors: m.
  """

  block_size: int = 4
  blocks: int = 0
  factors: int = 1

  def validate(self) -> None:
    """Raises a `UsageError` if a value is out of range."""
    if (self.block_size > 0) == (self.blocks > 0):
      raise errors.UsageError(
          f"adapter.options: block_size={self.block_size} and blocks="
          f"{self.blocks}; give one of them, and 0 for the other")
    if self.factors < 1:
      raise errors.UsageError(
          f"adapter.options.factors={self.factors} is out of range; use 1 or "
          "more")

  def block(self, i: int) -> int:
    """b of a matrix with i inputs.

    Raises:
      errors.UsageError: if blocks and butterflies do not fit.
    """
    size = self.block_size or max(1, i // self.blocks)
    wide = size * 2 ** (self.factors - 1)
    even = self.factors == 1 or (size % 2 == 0 and (i // size) % 2 == 0)
    if i % wide or not even or (self.blocks and i % self.blocks):
      raise errors.UsageError(
          f"adapter.options: {i} inputs are no {self.factors} butterflies of "
          f"blocks of {size}; choose a block_size that divides them")
    return size


@struct.dataclass
class BOFT(base.Adapter):
  """Attributes:

    q: `[m, i / b, b, b]`; only its skew part counts.
    s: `[o]`.
    rate: `[]`, of dropout.
    rank: `[]` int32, 0: not adapted.
  """

  q: types.Array = base.trained(None, None, None, None)
  s: types.Array = base.trained("out")
  rate: types.Array = base.frozen()
  rank: types.Array = base.frozen()

  def rotated(
      self, x: types.Array, noise: noise_lib.Noise | None = None
  ) -> jax.Array:
    """x R_m ... R_1 `[..., i]`, in x's dtype."""
    m, n, b, _ = self.q.shape
    skew = 0.5 * (self.q - self.q.swapaxes(2, 3))
    skew = self.active(skew, 0.0)
    if noise is not None:  # The Cayley transform of 0 is I.
      skew = jnp.where(self._dropped(noise.key), 0.0, skew)
    blocks = oft.cayley(skew).astype(x.dtype)
    for factor in reversed(range(m)):
      order = permutation(n * b, n // 2**factor, b // 2, m > 1)
      z = x[..., np.argsort(order)].reshape(*x.shape[:-1], n, b)
      z = jnp.einsum("...nb,nbc->...nc", z, blocks[factor])
      x = z.reshape(x.shape)[..., order]
    return x

  def _dropped(self, key):
    """Which blocks are, `[m, n, 1, 1]`."""
    m, n = self.q.shape[:2]
    factor, order = jax.random.split(key)
    chosen = jnp.arange(m) == jax.random.randint(factor, (), 0, m)
    blocks = jax.random.permutation(order, n) < jnp.floor(self.rate * n)
    return (chosen[:, None] & blocks)[..., None, None]

  def apply(self, x, weight, noise=None):
    y = quant.matmul(self.rotated(x, noise), weight)
    s = self.active(self.s, 1.0)
    return (s * y.astype(jnp.float32)).astype(y.dtype)

  def merge(self, weight):
    w = quant.dequantize(weight, jnp.float32)
    with jax.default_matmul_precision("highest"):
      rotation = self.rotated(jnp.eye(w.shape[0]))
      return (rotation @ w) * self.active(self.s, 1.0)

  def to_peft(self, embedding=False):
    return {"boft_R": self.q, "boft_s": self.s[:, None]}

  @classmethod
  def from_peft(cls, tensors, slot):
    return cls(q=jnp.asarray(tensors["boft_R"], jnp.float32),
               s=jnp.asarray(tensors["boft_s"], jnp.float32)[:, 0],
               **slot.values("rate", "rank"))


def permutation(size: int, blocks: int, half: int, wanted: bool) -> np.ndarray:
  """Order of inputs that makes butterfly partners neighbours, `[size]`.

  Each of `blocks` equal parts is cut into pieces of `half`; the even pieces
  come first. permutation(8, 1, 2, True) == [0, 1, 4, 5, 2, 3, 6, 7].
  """
  index = np.arange(size)
  if not wanted:
    return index
  pieces = index.reshape(blocks, -1, half)
  return np.concatenate(
      [pieces[:, ::2], pieces[:, 1::2]], axis=1).reshape(-1)


def init(key, weight, slot, shared=None):
  """The adapter of one module before the first step."""
  del key, shared
  i, o = weight.shape[-2:]
  b = slot.options.block(i)
  return BOFT(
      q=jnp.zeros((slot.options.factors, i // b, b, b), jnp.float32),
      s=jnp.ones(o, jnp.float32), **slot.values("rate", "rank"))


def _config(config: config_lib.AdapterConfig) -> dict[str, Any]:
  o = config.options
  return {"boft_block_size": o.block_size, "boft_block_num": o.blocks,
          "boft_n_butterfly_factor": o.factors,
          "boft_dropout": float(config.dropout), "bias": "none",
          "fan_in_fan_out": False, "init_weights": True}


def _block(config: Mapping[str, Any]) -> dict[str, Any]:
  names = {"block_size": "boft_block_size", "blocks": "boft_block_num",
           "factors": "boft_n_butterfly_factor"}
  return {"dropout": float(config.get("boft_dropout") or 0.0),
          "options": {ours: config[theirs] for ours, theirs in names.items()
                      if theirs in config}}


METHOD = method.Method(
    summary="h = ((x R_m ... R_1) W0) * s, R butterflies of rotations",
    paper="arXiv 2311.06243", adapter=BOFT, init=init,
    count="factors * i * options.block(i) + o", options=Options, ranked=False,
    form=method.Form(
        peft_type="BOFT", config=_config, block=_block, neutral={
            "bias": ("none",), "fan_in_fan_out": (False,)}))
