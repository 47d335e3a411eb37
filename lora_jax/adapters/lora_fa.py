"""LoRA-FA: LoRA with A frozen (Zhang et al. 2023, arXiv 2308.03303).

  h = x W0 + s dropout(x) A B        s = alpha / r

with A `[i, r]` random as in `lora` and never trained, B `[r, o]` = 0 at init.
The backward pass keeps x A `[t, r]` instead of x `[t, i]`, and the optimiser
has half as much to hold. Its files are LoRA's, and are read as LoRA.

`projected=true` trains B by the gradient whose change of A B is nearest to
that of the whole weight's (Hugging Face PEFT's `create_lorafa_optimizer`):

  g' = s^-2 (A^T A)^+ g        g `[r, o]`, clipped; Adam is given g'

Trainable parameters: r o a matrix.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import optax

from lora_jax import struct
from lora_jax import types
from lora_jax.adapters import base
from lora_jax.adapters import lora
from lora_jax.adapters import method

# What PEFT adds to the diagonal of A^T A.
RIDGE = 1e-8


@dataclasses.dataclass(frozen=True)
class Options:
  """Attributes:

    projected: whether the gradient of B is projected.
  """

  projected: bool = False


@struct.dataclass
class LoRAFA(lora.LoRA):
  """LoRA's fields, of which B is trained alone."""

  a: types.Array = base.frozen("in", None)

  def size(self) -> int:
    return int(self.rank.sum()) * self.b.shape[-1]


def init(key, weight, slot, shared=None):
  """The adapter of one module before the first step; see `starts`."""
  plain = lora.init(key, weight, slot, shared)
  return LoRAFA(**{field.name: getattr(plain, field.name)
                   for field in dataclasses.fields(plain)})


@dataclasses.dataclass(frozen=True)
class Projection(method.Rule):
  """The projected gradient of every LoRA-FA's B."""

  def wrap(self, inner):
    inner = optax.with_extra_args_support(inner)

    def update(updates, state, params=None, *, frozen, **extra):
      parts = {
          part: {
              name: _projected(one, getattr(frozen, part)[name])
              if isinstance(one, LoRAFA) else one
              for name, one in getattr(updates, part).items()}
          for part in ("layers", "outer")}
      updates = dataclasses.replace(updates, **parts)
      return inner.update(updates, state, params, frozen=frozen, **extra)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _projected(grads: LoRAFA, frozen: LoRAFA) -> LoRAFA:
  """Gradients with s^-2 (A^T A)^+ g in the place of g."""
  gram = jnp.einsum(
      "...ir,...is->...rs", frozen.a, frozen.a, precision="highest")
  inverse = jnp.linalg.pinv(
      gram + RIDGE * jnp.eye(gram.shape[-1]), hermitian=True)
  scale = jnp.where(frozen.rank > 0, frozen.scale, 1.0)[..., None, None]
  return dataclasses.replace(grads, b=jnp.matmul(
      inverse, grads.b, precision="highest") / jnp.square(scale))


def rule(config, steps):
  """What this adds to training: nothing, unless it is asked for."""
  del steps
  return Projection() if config.options.projected else method.Rule()


METHOD = method.Method(
    summary="h = x W0 + (alpha/r) x A B, A frozen", paper="arXiv 2308.03303",
    adapter=LoRAFA, init=init, count="r * o", options=Options, patterns=True,
    rule=rule, vllm=True, form=dataclasses.replace(
        lora.form(), same_as="lora"))
