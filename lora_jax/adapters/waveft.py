"""WaveFT: a few trained wavelet coefficients (Bilican et al. 2025, 2505.12532).

  h = x W0 + s x (R_o D R_i^T)^T

where D is zero but for n trained coefficients c, at places that are the same in
all modules of one shape, and the columns of R_i and R_o are the wavelets of
one level (`wavelets`); see `places`. c = 0 at the start, or N(0, 0.01^2).
Without the transform, R = I, n entries of the weight itself are trained.

Trainable parameters: n a matrix.

PEFT lays the coefficients out in quarters:

  coarse over o, coarse over i | detail over o, coarse over i
  coarse over o, detail over i | detail over o, detail over i

in which a place's row says which filter the input has, and its column which
the output has; of D it is the other way round.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import errors
from lora_jax import struct
from lora_jax.adapters import base
from lora_jax.adapters import fourierft
from lora_jax.adapters import method
from lora_jax.adapters import places
from lora_jax.adapters import wavelets


@dataclasses.dataclass(frozen=True)
class Options:
  """Attributes:

    n_frequency: n.
    scaling: s.
    wavelet_family: one of `wavelets.NAMES`; db1 is Haar's.
    use_idwt: whether there is a transform.
    random_loc_seed: of the places.
    init_weights: whether c starts at zero.
  """

  n_frequency: int = 2592
  scaling: float = 25.0
  wavelet_family: str = "db1"
  use_idwt: bool = True
  random_loc_seed: int = 777
  init_weights: bool = True

  def validate(self) -> None:
    """Raises:

      errors.UsageError: if the wavelet is unknown. PEFT's coif4 and coif5 are
        no wavelets: its taps do not sum to 1.
    """
    errors.choose("adapter.options.wavelet_family", self.wavelet_family,
                  dict.fromkeys(wavelets.NAMES))


@struct.dataclass
class WaveFT(places.Coefficients):
  """See `places.Coefficients`; `spectrum` is c.

  Attributes:
    wavelet: its name, or None where there is no transform.
  """

  wavelet: str | None = base.static(default="db1")

  def analysis(self, x):
    if self.wavelet is None:
      return x,
    return wavelets.analysis(self.wavelet, x),

  def synthesis(self, parts, size):
    part, = parts
    if self.wavelet is None:
      return part
    return wavelets.synthesis(self.wavelet, part, size)

  def waves(self, size):
    if self.wavelet is None:
      return size
    return wavelets.coefficients(self.wavelet, size)

  def delta(self, i, o):
    dense = jnp.zeros((self.waves(i), self.waves(o)), jnp.float32)
    dense = dense.at[self.columns, self.rows].set(self.values)
    return self.synthesis((self.synthesis((dense,), o).T,), i).T

  def to_peft(self, embedding=False):
    return {"waveft_spectrum": self.spectrum}

  @classmethod
  def from_peft(cls, tensors, slot):
    return cls(
        spectrum=jnp.asarray(tensors["waveft_spectrum"], jnp.float32),
        **_static(slot), **slot.values("scale", "rank"))


def _static(slot):
  options = slot.options
  return {"target": slot.target, "wavelet": (
      options.wavelet_family if options.use_idwt else None)}


def share(key, modules):
  """The places."""
  del key  # PEFT has a seed of their own.
  options, shapes = modules.options, modules.shapes
  found = places.draw(shapes, options.n_frequency, options.random_loc_seed)
  if options.use_idwt:
    found = {name: _waves(*pair, shapes[name], options.wavelet_family)
             for name, pair in found.items()}
  return places.shared(found)


def _waves(
    rows: np.ndarray, columns: np.ndarray, shape: tuple[int, ...], name: str
) -> tuple[np.ndarray, np.ndarray]:
  """The waves of the places (rows, columns) of a weight `(i, o)`."""
  i, o = shape
  (rows, low), (columns, left) = (
      np.divmod(at + (wavelets.coefficients(name, size) - size) // 2,
                wavelets.coefficients(name, size) // 2)[::-1]
      for at, size in ((rows, o), (columns, i)))
  # See above: the quarter's row is of the input's filter.
  return (rows + left * (wavelets.coefficients(name, o) // 2),
          columns + low * (wavelets.coefficients(name, i) // 2))


def init(key, weight, slot, shared=None):
  """The adapter of one module before the first step."""
  del weight, shared
  c = jnp.zeros(slot.options.n_frequency, jnp.float32)
  if not slot.options.init_weights:
    c = 0.01 * jax.random.normal(key, c.shape, jnp.float32)
  return WaveFT(spectrum=c, **_static(slot), **slot.values("scale", "rank"))


def _config(config):
  return fourierft.config_keys(config) | {"proportional_parameters": False}


def _block(config):
  return {"options": method.named(Options, config)}


def _shared(tensors, config, modules):
  del tensors, config
  return share(None, modules)


METHOD = method.Method(
    summary="h = x W0 + s x IDWT(c)", paper="arXiv 2505.12532",
    adapter=WaveFT, init=init, count="n_frequency", options=Options,
    scale=lambda alpha, r, options: options.scaling, ranked=False,
    share=share, tiny={"options": {"n_frequency": 100, "scaling": 1.0}},
    form=method.Form(
        peft_type="WAVEFT", config=_config, block=_block, shared=_shared,
        neutral=fourierft.NEUTRAL | {"proportional_parameters": (False,)}))
