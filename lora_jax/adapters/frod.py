"""FRoD: sparse and diagonal changes in a basis of all layers (2512.23485).

  W' = V (S + L)' U',   W0 = V diag(l0) U'          W0 `[i, o]`

V `[i, i]` is one for all adapted layers of a target, U' = diag(1/l0) V^-1 W0
`[i, o]` of each its own, with rows of length 1. Both are frozen. Trained are
the diagonal L `[i]` = l0 at init, and the n entries of S `[i, i]` = 0, off the
diagonal at places that layers share, too; n = `sparse_rate` i^2. U is never
made: with D = V (S + L - diag(l0))' diag(1/l0) V^-1,

  h = x W0 + dropout(x) D W0

V is a joint decomposition of the layers' weights: with the QR decomposition
Q R of W_1', W_2', ..., one below another, Q_k the rows of W_k,

  V = R' E,   T = mean_k (Q_k' Q_k + alpha I)^-1,   T E = E diag(t)

The signs of E's columns are whatever a library makes of them, and where t has
neighbours close by, so are the columns. Hugging Face PEFT nevertheless finds V
anew whenever it reads a folder, makes U of that, and then takes V from the
folder: two that do not belong together, if another library has written it. A
start here is therefore of alpha = `DETERMINED`, with which PEFT's E is I in
float32, and V = R' has the signs of Householder's algorithm everywhere. What
PEFT wrote with another alpha is read as it was trained: U follows from V.

The weights must have i outputs between them: a V that is made up where they
have none would be multiplied with nothing but their rounding.

V^-1 and l0 are computed in float64. D W0 adds up parts that cancel by V's
condition, so that D is made in float32; rounded to 16 bits for the product
with W0, it has an error of about 2^-9 times (the root mean square of V's
singular values) (that of their inverses).

Trainable parameters: i + n a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import errors
from lora_jax import host as host_lib
from lora_jax import quant
from lora_jax import struct
from lora_jax import types
from lora_jax.adapters import base
from lora_jax.adapters import config as config_lib
from lora_jax.adapters import method
from lora_jax.adapters import runs
from lora_jax.adapters import targets
from lora_jax.adapters import torch_random

# An alpha beside which float32 knows nothing of Q_k' Q_k.
DETERMINED = 1e30
# Lengths below which PEFT has no direction either.
NONE = 1e-12


@dataclasses.dataclass(frozen=True)
class Options:
  """Attributes:

    sparse_rate: n / i^2.
    regularization_alpha: alpha; of a start, `DETERMINED`.
    projection_key: seed of the places of S.
  """

  sparse_rate: float = 0.01
  regularization_alpha: float = DETERMINED
  projection_key: int = 0

  def validate(self) -> None:
    """Raises a `UsageError` if a value is out of range."""
    if not 0.0 <= self.sparse_rate <= 1.0:
      raise errors.UsageError(
          f"adapter.options.sparse_rate={self.sparse_rate} is out of range; "
          "use a share from 0 to 1")
    if not self.regularization_alpha > 0.0:
      raise errors.UsageError(
          "adapter.options.regularization_alpha="
          f"{self.regularization_alpha} is out of range; use a positive number")

  def entries(self, i: int) -> int:
    """n."""
    if not self.sparse_rate or i < 2:
      return 0
    return max(1, min(int(i * i * self.sparse_rate), i * (i - 1)))


@struct.dataclass
class Bases(base.Adapter):
  """What all modules share.

  Attributes:
    v: by target, `[i, i]`.
    inverse: by target, `[i, i]`, V^-1.
    places: by target, `[2, n]` int32: rows and columns of S.
  """

  v: Mapping[str, types.Array] = base.frozen()
  inverse: Mapping[str, types.Array] = base.frozen()
  places: Mapping[str, types.Array] = base.frozen()

  def to_peft(self, embedding=False):
    found: dict[str, Any] = {}
    for target, v in self.v.items():
      name = category(target)
      found |= {f"frod_V.{name}": v,
                # As PEFT has it, on the host, where files are written.
                f"frod_s_indices.{name}": np.asarray(
                    self.places[target], np.int64),
                f"frod_s_size.{name}": np.asarray(v.shape, np.int64)}
    return found


@dataclasses.dataclass(frozen=True)
class Lengths:
  """l0 `[i]` float32 of a weight `[i, o]`, in float64 as PEFT computes it."""

  target: str

  def __call__(self, weight: types.Tree, shared: Bases) -> jax.Array:
    w = quant.dequantize(weight, jnp.float32)
    return jax.pure_callback(
        _lengths, jax.ShapeDtypeStruct(w.shape[:1], jnp.float32), w,
        shared.v[self.target], vmap_method="sequential")


def _lengths(w, v):
  w, v = (np.asarray(x, np.float64) for x in (w, v))
  try:
    found = np.linalg.solve(v, w)
  except np.linalg.LinAlgError:  # As PEFT does it.
    found = np.linalg.pinv(v, rcond=1e-6) @ w
  return np.linalg.norm(found, axis=1).astype(np.float32)


@struct.dataclass
class FRoD(base.Adapter):
  """Attributes:

    lambda_l: `[i]`, L.
    values: `[n]`, of S.
    rate: `[]`, dropout rate.
    rank: `[]` int32, 0: not adapted.
    lengths: `[i]`, l0, once the weight is known.
    target: its name.
    bases: while it is used; see `Adapters.shared`.
  """

  lambda_l: types.Array = base.trained(None)
  values: types.Array = base.trained(None)
  rate: types.Array = base.frozen()
  rank: types.Array = base.frozen()
  lengths: types.Array | None = base.frozen(default=None)
  target: str = base.static(default="")
  bases: Any = base.frozen(default=None)

  @property
  def constants(self):  # type: ignore[override]
    # What it started from, it keeps, whatever becomes of the base.
    return {} if self.lengths is not None else {
        "lengths": Lengths(self.target)}

  def with_constants(self, values):
    return self if values.get("lengths") is None else dataclasses.replace(
        self, **values)

  def bound(self, shared):
    return dataclasses.replace(self, bases=shared)

  def _known(self, weight):
    """l0 `[i]`."""
    if self.lengths is not None:
      return self.lengths
    return Lengths(self.target)(jax.lax.stop_gradient(weight), self.bases)

  def prepared(self, weight, shared=None):
    if self.lengths is not None:
      return self
    return dataclasses.replace(
        self, lengths=self.bound(shared)._known(weight))

  def change(self, x: types.Array, weight: types.Tree) -> jax.Array:
    """x D, `[..., i]` in x's dtype."""
    l0, bases = self._known(weight), self.bases
    z = x @ bases.v[self.target].astype(x.dtype)
    turned = self._sparse(z).astype(jnp.float32)
    turned += z.astype(jnp.float32) * self.active(self.lambda_l - l0, 0.0)
    scaled = turned * jnp.where(l0 > NONE, 1 / jnp.maximum(l0, NONE), 0.0)
    return jnp.matmul(scaled, bases.inverse[self.target],
                      precision="highest").astype(x.dtype)

  def _sparse(self, z):
    """z S', `[..., i]` in z's dtype."""
    rows, columns = self.bases.places[self.target]
    values = self.active(self.values, 0.0).astype(z.dtype)
    i = z.shape[-1]
    if math.prod(z.shape[:-1]) * len(values) < i * i:  # Of a few tokens.
      return jnp.zeros_like(z).at[..., rows].add(z[..., columns] * values)
    return z @ jnp.zeros((i, i), z.dtype).at[columns, rows].add(values)

  def apply(self, x, weight, noise=None):
    dropped = x if noise is None else noise.dropout(x, self.rate)
    # Not (x + x D) W0: in 16 bits, x + x D is x for a small D.
    return quant.matmul(x, weight) + quant.matmul(
        self.change(dropped, weight), weight)

  def merge(self, weight):
    w = quant.dequantize(weight, jnp.float32)
    with jax.default_matmul_precision("highest"):
      change = self.change(jnp.eye(w.shape[0]), weight)
      return w + change @ w

  def to_peft(self, embedding=False):
    return {"frod_lambda_l": self.lambda_l,
            "frod_lambda_s_values": self.values}

  @classmethod
  def from_peft(cls, tensors, slot):
    return cls(
        lambda_l=jnp.asarray(tensors["frod_lambda_l"], jnp.float32),
        values=jnp.asarray(tensors["frod_lambda_s_values"], jnp.float32),
        target=slot.target, **slot.values("rate", "rank"))


def category(target: str) -> str:
  """PEFT's name of a target's basis."""
  if target in targets.ATTENTION:
    return f"self_attn_{target}"
  return f"mlp_{target}" if target in targets.MLP else target


def share(key, modules):
  """The bases.

  Raises:
    errors.UsageError: if the adapted layers of a target have less outputs than
      inputs, or for another alpha than `DETERMINED`.
  """
  del key  # PEFT has a seed of their own, and V is of the weights.
  alpha = modules.options.regularization_alpha
  if alpha != DETERMINED:
    raise errors.UsageError(
        f"adapter.options.regularization_alpha={alpha} makes a basis that "
        "depends on the library, which PEFT would misread; leave it at "
        f"{DETERMINED}")
  _check(modules)
  found = {}
  for target, weight in modules.weights.items():
    layers = tuple(
        layer for layer, rank in enumerate(modules.ranks[target]) if rank)
    found[target] = _basis(
        weight, layers=layers if len(weight.shape) == 3 else None)
  return Bases(v={target: v for target, (v, _) in found.items()},
               inverse={target: x for target, (_, x) in found.items()},
               places=_drawn(modules))


def _check(modules):
  for target, (i, o) in modules.shapes.items():
    count = sum(rank > 0 for rank in modules.ranks[target])
    if count * o < i:
      raise errors.UsageError(
          f"adapter.targets: {target} has {i} inputs, and its {count} adapted "
          f"layers have {o} outputs each, too few to tell a basis; adapt more "
          "layers, or leave it out")


def _drawn(modules):
  """Places of S by target, as PEFT draws them."""
  generator = torch_random.Generator(modules.options.projection_key)
  found = {}
  for target in sorted(modules.shapes, key=category):
    i = modules.shapes[target][0]
    # Of all places row by row, without those of the diagonal.
    rows, columns = np.divmod(generator.randperm(
        i * (i - 1), first=modules.options.entries(i)), max(1, i - 1))
    found[target] = jnp.asarray(
        np.stack([rows, columns + (columns >= rows)]), jnp.int32)
  return found


@functools.partial(jax.jit, static_argnames="layers")
def _basis(weight, *, layers):
  """(V, V^-1) `[i, i]` of some of a stack of weights; None: of one weight."""
  i, o = weight.shape[-2:]
  square = jax.ShapeDtypeStruct((i, i), jnp.float32)

  def plain(layer):
    one = (host_lib.on_device(weight) if layers is None
           else runs.layer(weight, layer))
    return quant.dequantize(one, jnp.float32)

  # Rows that reflections take their signs from are there as they are; of what
  # is below, only products of columns count: one layer at a time.
  every = layers or (0,)
  first, rest = every[:-(-i // o)], every[-(-i // o):]
  below = jnp.zeros((i, i), jnp.float32)
  if rest:
    below, _ = jax.lax.scan(
        lambda below, layer: (jax.pure_callback(
            _triangle, square, below, plain(layer)), None),
        below, jnp.asarray(rest))
  return jax.pure_callback(
      _of_rows, (square, square), below, *map(plain, first))


def _triangle(below, *weights):
  """R `[i, i]` of the outputs of weights, and of rows below them."""
  rows = [np.asarray(w, np.float64).T for w in weights]
  r = np.linalg.qr(
      np.concatenate([*rows, np.asarray(below, np.float64)]), mode="r")
  return np.asarray(r, np.float32)


def _of_rows(below, *weights):
  v = _triangle(below, *weights).T
  try:
    return v, _inverse(v)
  except np.linalg.LinAlgError:  # Of an input that no weight reads.
    return v, np.linalg.pinv(
        v.astype(np.float64), rcond=1e-6).astype(np.float32)


def _inverse(v):
  return np.linalg.inv(np.asarray(v, np.float64)).astype(np.float32)


def init(key, weight, slot, shared=None):
  """The adapter of one module before the first step."""
  del key
  lengths = Lengths(slot.target)(weight, shared)
  return FRoD(
      lambda_l=lengths, lengths=lengths, target=slot.target,
      values=jnp.zeros(slot.options.entries(lengths.shape[0]), jnp.float32),
      **slot.values("rate", "rank"))


def _config(config: config_lib.AdapterConfig) -> dict[str, Any]:
  options = config.options
  return {"sparse_rate": options.sparse_rate,
          "regularization_alpha": options.regularization_alpha,
          "projection_prng_key": options.projection_key,
          "frod_dropout": float(config.dropout), "save_projection": True,
          "init_weights": True, "fan_in_fan_out": False, "bias": "none"}


def _block(config: Mapping[str, Any]) -> dict[str, Any]:
  return {"dropout": float(config.get("frod_dropout") or 0.0),
          "options": {"regularization_alpha": 1e-3} | method.named(
              Options, config) | {
                  "projection_key": config["projection_prng_key"]}}


def _shared(tensors, config, modules):
  _check(modules)
  v, inverse, places = {}, {}, {}
  for target, (i, _) in modules.shapes.items():
    name = category(target)
    own = np.asarray(tensors[f"frod_V.{name}"], np.float32)
    at = np.asarray(tensors[f"frod_s_indices.{name}"])
    if own.shape != (i, i) or at.shape != (2, config.options.entries(i)) or (
        at.size and (at.min() < 0 or at.max() >= i)):
      raise errors.UserError(
          f"frod_V.{name} {own.shape} and frod_s_indices.{name} {at.shape} do "
          f"not fit {target}'s {i} inputs; the adapter was made for another "
          "base")
    try:
      inverse[target] = jnp.asarray(_inverse(own))
    except np.linalg.LinAlgError:
      raise errors.UserError(
          f"frod_V.{name} has no inverse; save the adapter again") from None
    v[target], places[target] = jnp.asarray(own), jnp.asarray(at, jnp.int32)
  return Bases(v=v, inverse=inverse, places=places)


METHOD = method.Method(
    summary="h = x V (S + L)' U', W0 = V diag(l0) U' with V of all layers",
    paper="arXiv 2512.23485", adapter=FRoD, init=init, share=share,
    count="i + options.entries(i)", options=Options, ranked=False,
    tiny={"targets": "q_proj,up_proj,down_proj",
          "options": {"sparse_rate": 0.2}},
    form=method.Form(
        peft_type="FROD", config=_config, block=_block, shared=_shared,
        # Without V, a folder does not determine the model: eigenvectors have
        # whatever signs a library gives them.
        neutral={"save_projection": (True,), "bias": ("none",),
                 "fan_in_fan_out": (False,)}))
