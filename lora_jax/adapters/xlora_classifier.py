"""The classifier of X-LoRA: which experts a token has; see `xlora`.

  z -> relu(z W + b) -> dropout -> ... -> [n, K] -> softmax( / T) -> top -> g
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import errors
from lora_jax import struct
from lora_jax import types
from lora_jax.adapters import base
from lora_jax.adapters import pieces

# Trained parameters, for `method.Method`.
COUNT = (
    "((d + 1) * size + (depth - 2) * (size + 1) * size if depth > 1 else 0) "
    "+ ((size if depth > 1 else d) + 1) * experts * "
    "(modules if layerwise else 1)")
TRAINED = ("w_in", "b_in", "w_mid", "b_mid", "w_out", "b_out")


@dataclasses.dataclass(frozen=True)
class Options:
  """Attributes:

    experts: K.
    depth: layers of the MLP.
    size: c, their width.
    layerwise: whether every projection has scalings of its own.
    softmax: whether g is a softmax; else it is what the MLP gives.
    top: experts of a token; 0 is all.
    softmax_top: whether these are in a softmax (again).
    temperature: T.
    weight: w.
    dropout: rate behind each ReLU.
    trainable: whether the experts are trained, too.
  """

  experts: int = 4
  depth: int = 1
  size: int = 2048
  layerwise: bool = False
  softmax: bool = True
  top: int = 0
  softmax_top: bool = False
  temperature: float = 1.0
  weight: float = 1.0
  dropout: float = 0.2
  trainable: bool = True

  def validate(self) -> None:
    """Raises a `UsageError` if a value is out of range."""
    for name, low, high in (
        ("experts", 1, 256), ("depth", 1, 64), ("size", 1, 65536),
        ("top", 0, self.experts)):
      if not low <= getattr(self, name) <= high:
        raise errors.UsageError(
            f"adapter.options.{name}={getattr(self, name)} is out of range; "
            f"use an integer from {low} to {high}")
    if not self.temperature > 0:
      raise errors.UsageError(
          f"adapter.options.temperature={self.temperature} is out of range; "
          "use a positive number")
    if not 0 <= self.dropout < 1:
      raise errors.UsageError(
          f"adapter.options.dropout={self.dropout} is out of range; use a "
          "rate in [0, 1)")

  @property
  def samples(self) -> bool:
    """Whether training is random without the experts' dropout."""
    return self.depth > 1 and self.dropout > 0


@struct.dataclass
class Classifier(base.Adapter):
  """What all projections share. Without hidden layers those are None.

  Attributes:
    w_in, b_in: `[d, c]`, `[c]`.
    w_mid, b_mid: `[depth - 2, c, c]`, `[depth - 2, c]`; None if there are
      none.
    w_out, b_out: `[c, n, K]`, `[n, K]`; n is 1, or how many projections.
    temperature, weight, drop: `[]`.
    softmax, top, softmax_top: static.
  """

  w_out: types.Array = base.trained(None, None, None)
  b_out: types.Array = base.trained(None, None)
  temperature: types.Array = base.frozen()
  weight: types.Array = base.frozen()
  drop: types.Array = base.frozen()
  w_in: types.Array = base.trained(None, None, default=None)
  b_in: types.Array = base.trained(None, default=None)
  w_mid: types.Array = base.trained(None, None, None, default=None)
  b_mid: types.Array = base.trained(None, None, default=None)
  softmax: bool = base.static(default=True)
  top: int = base.static(default=0)
  softmax_top: bool = base.static(default=False)

  def layers(self) -> list[tuple[types.Array, types.Array]]:
    """Weight `[i, o]` and bias `[o]` of each."""
    found = [] if self.w_in is None else [(self.w_in, self.b_in)]
    if self.w_mid is not None:
      found += list(zip(self.w_mid, self.b_mid, strict=True))
    i = self.w_out.shape[0]
    return [*found, (self.w_out.reshape(i, -1), self.b_out.reshape(-1))]

  def guide(self, hidden, noise=None):
    """w g `[b, t, n, K]` float32."""
    *inner, last = self.layers()

    def linear(h, w, b):
      return b + jnp.matmul(
          h, w.astype(h.dtype), preferred_element_type=jnp.float32)

    for number, (w, b) in enumerate(inner):
      hidden = jax.nn.relu(linear(hidden, w, b)).astype(hidden.dtype)
      if noise is not None:
        hidden = noise.for_target(f"classifier.{number}").dropout(
            hidden, self.drop)
    logits = linear(hidden, *last)
    return self.weight * self.gates(
        logits.reshape(*logits.shape[:-1], *self.b_out.shape))

  def gates(self, g: jax.Array) -> jax.Array:
    """g `[..., K]` of the MLP's numbers."""
    if self.softmax:
      g = jax.nn.softmax(g / self.temperature)
    if self.top:
      _, chosen = jax.lax.top_k(g, self.top)
      g = g * jax.nn.one_hot(chosen, g.shape[-1]).sum(-2)
    if self.softmax_top:
      # As PEFT has it: what is 0 is none of them.
      kept = g != 0
      g = jnp.where(kept, jax.nn.softmax(jnp.where(kept, g, -1e30)), 0.0)
    return g


def share(key, modules):
  """The classifier before the first step.

  Raises:
    errors.UsageError: if the head is to be adapted.
  """
  if "lm_head" in modules.shapes:
    raise errors.UsageError(
        'adapter.targets: "lm_head" stands behind the layers that '
        "adapter.method=xlora scales; take it out")
  options = modules.options
  count = sum(rank > 0 for ranks in modules.ranks.values() for rank in ranks)
  n, d, c = (
      count if options.layerwise else 1, modules.geometry.d, options.size)
  keys = iter(jax.random.split(key, 6))

  def layer(fan_in, *outputs, stack=()):
    return tuple(pieces.uniform(next(keys), shape, fan_in) for shape in (
        (*stack, fan_in, *outputs), (*stack, *outputs)))

  found: dict[str, Any] = {}
  if options.depth > 1:
    found["w_in"], found["b_in"] = layer(d, c)
  if options.depth > 2:
    found["w_mid"], found["b_mid"] = layer(c, c, stack=(options.depth - 2,))
  found["w_out"], found["b_out"] = layer(
      c if options.depth > 1 else d, n, options.experts)
  return Classifier(
      **found, temperature=jnp.float32(options.temperature),
      weight=jnp.float32(options.weight), drop=jnp.float32(options.dropout),
      softmax=options.softmax, top=options.top,
      softmax_top=options.softmax_top)
