"""FourierFT: a few trained entries of a spectrum (Gao et al. 2024, 2405.03003).

  h = x W0 + s x Re(F^-1(D))^T          (eq. 2 and 3)

where D `[o, i]` is zero but for n trained coefficients c at the places (u, v),
the same in all modules of one shape, and F^-1 is the inverse discrete Fourier
transform in two dimensions:

  Delta W[q, p] = s / (i o) sum_n c_n cos(2 pi (u_n p / o + v_n q / i))

The cosine of a sum parts into waves over the input and waves over the output;
see `places`. c ~ N(0, 1) at the start, with which the model is not the base,
or 0.

Trainable parameters: n a matrix.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import struct
from lora_jax import types
from lora_jax.adapters import config as config_lib
from lora_jax.adapters import method
from lora_jax.adapters import places


@dataclasses.dataclass(frozen=True)
class Options:
  """Attributes:

    n_frequency: n.
    scaling: s; 300 is the paper's for instruction tuning of LLaMA.
    random_loc_seed: of the places.
    init_weights: whether c starts at zero.
  """

  n_frequency: int = 1000
  scaling: float = 150.0
  random_loc_seed: int = 777
  init_weights: bool = False


@struct.dataclass
class FourierFT(places.Coefficients):
  """See `places.Coefficients`; `spectrum` is c."""

  def analysis(self, x):
    return waves(x / x.shape[-1])

  def synthesis(self, parts, size):
    # cos(a + b) = cos a cos b - sin a sin b; waves are their own transpose.
    cosines, sines = parts
    like = jax.ShapeDtypeStruct((*cosines.shape[:-1], size), cosines.dtype)
    back = jax.linear_transpose(waves, like)
    return back((cosines, -sines))[0] / size

  def waves(self, size):
    return size

  def delta(self, i, o):
    spectrum = jnp.zeros((o, i), jnp.float32).at[self.rows, self.columns].set(
        self.values)
    return jnp.fft.ifft2(spectrum).real.T

  def to_peft(self, embedding=False):
    return {"fourierft_spectrum": self.spectrum}

  @classmethod
  def from_peft(cls, tensors, slot):
    return cls(
        spectrum=jnp.asarray(tensors["fourierft_spectrum"], jnp.float32),
        target=slot.target, **slot.values("scale", "rank"))


def waves(x: types.Array) -> places.Parts:
  """sum_q x_q cos(2 pi v q / n) and the same of sines, `[..., n]` each over v.

  In two steps of n = a b (Cooley and Tukey 1965), as products of small
  matrices: unlike an FFT, these can be cut over devices along x's other axes.

  Args:
    x: `[..., n]`.
  """
  n = x.shape[-1]
  a = max(a for a in range(1, math.isqrt(n) + 1) if n % a == 0)
  b = n // a
  # With q = b q1 + q2 and v = v1 + a v2, v q / n is, up to whole turns,
  # v1 q1 / a + v1 q2 / n + v2 q2 / b. Cosines and sines stand side by side.
  first, turns, (cos3, sin3) = (
      _turns(a, a, a), _turns(a, b, n), _turns(b, b, b))
  last = np.block([[cos3, sin3], [-sin3, cos3]])
  h = x.reshape(*x.shape[:-1], a, b).swapaxes(-1, -2)
  h = (h @ jnp.asarray(np.hstack(first), x.dtype)).swapaxes(-1, -2)
  even, odd = h[..., :a, :], h[..., a:, :]
  cos, sin = (jnp.asarray(table, x.dtype) for table in turns)
  h = jnp.concatenate([even * cos - odd * sin, even * sin + odd * cos], -1)
  h = (h @ jnp.asarray(last, x.dtype)).swapaxes(-1, -2)
  return h[..., :b, :].reshape(x.shape), h[..., b:, :].reshape(x.shape)


@functools.lru_cache(maxsize=64)
def _turns(a: int, b: int, n: int) -> tuple[np.ndarray, np.ndarray]:
  """Cosine and sine of 2 pi k l / n, `[a, b]` over k < a and l < b."""
  angle = 2 * math.pi / n * (np.outer(np.arange(a), np.arange(b)) % n)
  return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def share(key, modules):
  """The places."""
  del key  # PEFT has a seed of their own.
  options = modules.options
  return places.shared(places.draw(
      modules.shapes, options.n_frequency, options.random_loc_seed))


def init(key, weight, slot, shared=None):
  """The adapter of one module before the first step."""
  del weight, shared
  c = jax.random.normal(key, (slot.options.n_frequency,), jnp.float32)
  if slot.options.init_weights:
    c = jnp.zeros_like(c)
  return FourierFT(
      spectrum=c, target=slot.target, **slot.values("scale", "rank"))


def config_keys(config: config_lib.AdapterConfig) -> dict[str, Any]:
  """The keys of PEFT's config that have the options' names."""
  return dataclasses.asdict(config.options) | {
      "n_frequency_pattern": {}, "fan_in_fan_out": False, "bias": "none"}


def _block(config):
  return {"options": method.named(Options, config)}


def _shared(tensors, config, modules):
  del tensors, config
  return share(None, modules)


NEUTRAL: dict[str, tuple] = {
    "n_frequency_pattern": ({}, None), "fan_in_fan_out": (False,),
    "bias": ("none",)}

METHOD = method.Method(
    summary="h = x W0 + s x Re(IDFT(c))", paper="arXiv 2405.03003",
    adapter=FourierFT, init=init, count="n_frequency", options=Options,
    scale=lambda alpha, r, options: options.scaling, ranked=False,
    identity_at_init=False, share=share,
    tiny={"options": {"n_frequency": 64, "scaling": 20.0}},
    form=method.Form(
        peft_type="FOURIERFT", config=config_keys, block=_block,
        shared=_shared, neutral=NEUTRAL))
