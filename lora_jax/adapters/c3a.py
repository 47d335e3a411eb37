"""C3A: circular convolution adaptation (Chen et al. 2024, arXiv 2407.19342).

  h = x W0 + x C / i

with C `[i, o]` cut into blocks of p x p that are circulant: block (n, m) has
w_mn[(s - t) mod p] in row s and column t. It is multiplied by FFTs, in
float32 (X and w with hats are those along blocks):

  h_m = x W0 + irfft(sum_n X_n conj(w_mn)) / i

1/i is PEFT's. The kernels start at U(-a, a), a = sqrt(6 / (i + o))
("xavier_uniform", PEFT's default, h is near x W0), or as `Options` has it.

Trainable parameters: i o / p a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import errors
from lora_jax import quant
from lora_jax import struct
from lora_jax import types
from lora_jax.adapters import base
from lora_jax.adapters import config as config_lib
from lora_jax.adapters import method

# PEFT's names; its True are zeros.
STARTS = ("xavier_uniform", "kaiming_uniform", "gaussian", "zeros")


@dataclasses.dataclass(frozen=True)
class Options:
  """Attributes:

    block_size: p, which divides i and o of every target.
    init_weights: where the kernels start: "xavier_uniform",
      "kaiming_uniform" (a = 1/sqrt(i)), "gaussian" (N(0, 1)) or "zeros".
  """

  block_size: int = 256
  init_weights: str = "xavier_uniform"

  def validate(self) -> None:
    """Raises a `UsageError` if a value is none that is known."""
    errors.choose("adapter.options.init_weights", self.init_weights,
                  dict.fromkeys(STARTS))
    if self.block_size < 1:
      raise errors.UsageError(
          f"adapter.options.block_size={self.block_size} is out of range; use "
          "a positive number that divides the sizes of all targets")


@struct.dataclass
class C3A(base.Adapter):
  """Attributes (a leading `l` axis when stacked):

    kernel: w `[o/p, i/p, p]`.
    rank: `[]` int32, 0: not adapted.
  """

  kernel: types.Array = base.trained()
  rank: types.Array = base.frozen()

  def _scaled(self):
    _, n, p = self.kernel.shape
    return self.active(self.kernel, 0.0) / (n * p)

  def apply(self, x, weight, noise=None):
    del noise
    kernel = self._scaled()
    _, n, p = kernel.shape
    blocks = x.astype(jnp.float32).reshape(*x.shape[:-1], n, p)
    y = jnp.einsum("...nf,mnf->...mf", jnp.fft.rfft(blocks),
                   jnp.conj(jnp.fft.rfft(kernel)))
    y = jnp.fft.irfft(y, p).reshape(*x.shape[:-1], -1)
    return quant.matmul(x, weight) + y.astype(x.dtype)

  def merge(self, weight):
    w = quant.dequantize(weight, jnp.float32)
    p = self.kernel.shape[-1]
    turned = (jnp.arange(p)[:, None] - jnp.arange(p)) % p
    circulant = self._scaled()[:, :, turned]  # [m, n, s, t]
    return w + circulant.transpose(1, 2, 0, 3).reshape(w.shape)

  def to_peft(self, embedding=False):
    return {"c3a_kernel": self.kernel}

  @classmethod
  def from_peft(cls, tensors, slot):
    return cls(kernel=jnp.asarray(tensors["c3a_kernel"], jnp.float32),
               rank=slot.rank)


def init(key, weight, slot, shared=None):
  """The adapter of one module before the first step.

  Raises:
    errors.UsageError: if p does not divide i and o.
  """
  del shared
  (i, o), p = weight.shape[-2:], slot.options.block_size
  if i % p or o % p:
    raise errors.UsageError(
        f"adapter.options.block_size={p} does not divide {i} x {o} of "
        f'"{slot.target}"; use a common divisor of the sizes of all targets')
  shape, start = (o // p, i // p, p), slot.options.init_weights
  if start == "zeros":
    kernel = jnp.zeros(shape, jnp.float32)
  elif start == "gaussian":
    kernel = jax.random.normal(key, shape, jnp.float32)
  else:
    bound = (1 / i if start == "kaiming_uniform" else 6 / (i + o)) ** 0.5
    kernel = jax.random.uniform(key, shape, jnp.float32, -bound, bound)
  return C3A(kernel=kernel, rank=slot.rank)


def _config(config: config_lib.AdapterConfig) -> dict[str, Any]:
  start = config.options.init_weights
  return {"block_size": config.options.block_size, "block_size_pattern": {},
          "bias": "none", "init_weights": True if start == "zeros" else start}


def _block(config: Mapping[str, Any]) -> dict[str, Any]:
  start = config.get("init_weights", STARTS[0])
  if not isinstance(start, str):
    start = "zeros" if start else STARTS[0]
  return {"options": {"block_size": config.get("block_size", 256),
                      "init_weights": start}}


METHOD = method.Method(
    summary="h = x W0 + x C / i, C of circulant blocks",
    paper="arXiv 2407.19342", adapter=C3A, init=init,
    count="i * o // block_size", options=Options, ranked=False,
    identity_at_init=False,
    # The vocabulary of the tests is a prime.
    tiny={"targets": "q_proj,up_proj,down_proj",
          "options": {"block_size": 8, "init_weights": "gaussian"}},
    form=method.Form(
        peft_type="C3A", config=_config, block=_block,
        neutral={"bias": ("none",), "block_size_pattern": (None, {})}))
