"""Random bases: for tests, benchmarks and pretraining from nothing."""

from __future__ import annotations

from collections.abc import Collection
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from lora_jax import host as host_lib
from lora_jax import quant
from lora_jax import types
from lora_jax.models import config as config_lib
from lora_jax.models import decoder
from lora_jax.models import hf
from lora_jax.models import sharding


def random_base(
    key: jax.Array,
    config: config_lib.ModelConfig,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
) -> decoder.Base:
  """A base with weights ~ N(0, 1/i), biases ~ N(0, 1/16), norms near 1.

  No parameter is 0 or 1 exactly, so that a test notices each of them.

  Args:
    key: PRNG key.
    config: the model.
    dtype: of every leaf.
    mesh: where it lives, drawn in parts with the same values; None is the
      default device.

  Returns:
    The base, layers stacked.
  """
  draw = lambda key: _random_base(key, config, dtype)
  if mesh is None:
    return draw(key)
  homes = sharding.shardings(mesh, jax.eval_shape(draw, key))
  return jax.jit(draw, out_shardings=homes)(key)


def _random_base(key, config, dtype) -> decoder.Base:
  slots = hf.slots(config)
  drawn = {}
  for slot, sub in zip(slots, jax.random.split(key, len(slots)), strict=True):
    lead = (config.n_layers,) if slot.stacked else ()
    drawn[slot.target, slot.leaf] = _draw(sub, slot, lead, dtype)
  return assemble(config, drawn)


def _draw(key, slot: hf.Slot, lead: tuple[int, ...], dtype) -> jax.Array:
  """A parameter `[*lead, i, o]` or `[*lead, o]`."""
  shape = slot.shape[::-1] if slot.linear else slot.shape
  noise = jax.random.normal(key, (*lead, *shape), jnp.float32)
  if slot.linear:
    value = noise / math.sqrt(slot.shape[1])
  elif slot.leaf == "bias":
    value = noise / 4
  elif slot.target == "embed_tokens":
    value = noise
  else:
    value = 1 + noise / 8
  return value.astype(dtype)


# Standard deviation of what is drawn for pretraining.
FRESH_STD = 0.02
# Projections that write into the residual stream.
WRITERS = ("o_proj", "down_proj")


def fresh_base(
    key: jax.Array, config: config_lib.ModelConfig, dtype: Any = jnp.float32
) -> decoder.Base:
  """A base to be pretrained.

  Weights and embeddings ~ N(0, 0.02^2), those of the two projections that
  write into the residual stream ~ N(0, 0.02^2 / 2 l), so that its variance
  does not grow with the layers that add to it; norms multiply by 1, biases
  are 0.

  Source: Radford et al. 2019 (GPT-2), section 2.3.

  Args:
    key: PRNG key.
    config: the model.
    dtype: of every leaf.

  Returns:
    The base on the default device, layers stacked.
  """
  leaves = {}
  for slot in hf.slots(config):
    layers = range(config.n_layers) if slot.stacked else (None,)
    ones = [fresh(key, config, slot, layer) for layer in layers]
    ones = [(one.T if slot.linear else one).astype(dtype) for one in ones]
    leaves[slot.target, slot.leaf] = (
        jnp.stack(ones) if slot.stacked else ones[0])
  return assemble(config, leaves)


def fresh(
    key: jax.Array, config: config_lib.ModelConfig, slot: hf.Slot,
    layer: int | None
) -> jax.Array:
  """A layer's parameter of `fresh_base`, in float32 and Hugging Face's layout.

  Args:
    key, config: as there.
    slot: of `hf.slots(config)`.
    layer: its number; None outside of layers.
  """
  if slot.leaf == "bias":
    return jnp.zeros(slot.shape)
  if len(slot.shape) == 1:
    return jnp.full(slot.shape, 1.0 - config.norm_offset)
  std = FRESH_STD
  if slot.target in WRITERS:
    std /= math.sqrt(2 * config.n_layers)
  number = [*hf.MODULES, *hf.OUTER].index(slot.target)
  key = jax.random.fold_in(jax.random.fold_in(key, number), layer or 0)
  return std * jax.random.normal(key, slot.shape, jnp.float32)


def quantised_base(
    key: jax.Array,
    config: config_lib.ModelConfig,
    spec: quant.QuantSpec,
    dtype: Any = jnp.bfloat16,
    skip: Collection[str] = ("lm_head", "embed_tokens"),
    host: bool = False,
) -> decoder.Base:
  """A base as `random_base` draws it (other numbers), already quantised.

  Embeddings that are the head as well are ~ N(0, 1/d), so that logits have
  the variance that a head gives them.

  Every layer of a projection is drawn and quantised by itself: of a model of
  70 B parameters not even one projection's floats would fit beside the rest.

  Args:
    key: PRNG key.
    config: the model.
    spec: how projections are quantised.
    dtype: of what is not quantised, and of weights before they are.
    skip: targets that are not quantised.
    host: whether the layers' matrices go to the host's memory, as by
      `host.placed`; the device then holds one of them at a time.

  Returns:
    The base on the default device, layers stacked.

  Raises:
    errors.UserError: see `quant.quantize`.
  """
  quant.check(spec)
  slots = hf.slots(config)
  drawn = {}
  for slot, sub in zip(slots, jax.random.split(key, len(slots)), strict=True):
    quantised = slot.linear and slot.target not in skip
    drawn[slot.target, slot.leaf] = _stored(
        jax.random.split(sub, config.n_layers if slot.stacked else 1),
        # Projections of one shape share a program.
        hf.Slot("" if slot.linear else slot.target, slot.leaf, slot.shape,
                slot.stacked, slot.linear),
        spec if quantised else quant.QuantSpec("none"), jnp.dtype(dtype),
        host)
  if config.tie_embeddings:
    drawn["embed_tokens", "weight"] *= config.d_model**-0.5
  return assemble(config, drawn)


def _stored(keys, slot: hf.Slot, spec, dtype, host) -> types.Tree:
  """A parameter, or its stack, filled a layer after the other."""
  how = {"slot": slot, "spec": spec, "dtype": dtype}
  if not slot.stacked:
    return _one(keys[0], **how)
  like = jax.eval_shape(functools.partial(_one, **how), keys[0])
  if host:
    return _in_host(keys, like, how)
  stack = jax.tree.map(
      lambda x: jnp.zeros((len(keys), *x.shape), x.dtype), like)
  for layer, key in enumerate(keys):
    stack = _put(stack, jnp.int32(layer), key, **how)
  return stack


def _in_host(keys, like, how) -> types.Tree:
  """The stack in the host's memory, but what is too small for that."""
  stack = jax.tree.map(
      lambda x: np.empty((len(keys), *x.shape), x.dtype), like)
  for layer, key in enumerate(keys):
    for whole, one in zip(*map(jax.tree.leaves, (stack, _one(key, **how)))):
      whole[layer] = one
  place = host_lib.default()
  return jax.tree.map(
      lambda x: jax.device_put(
          x, place if host_lib.stays(x) else host_lib.home(place)), stack)


@functools.partial(jax.jit, static_argnames=("slot", "spec", "dtype"))
def _one(key, slot, spec, dtype) -> types.Tree:
  value = _draw(key, slot, (), dtype)
  return quant.quantize(value, spec) if slot.linear else value


# Not a loop inside the program: XLA carries the stack through that in another
# layout than it gives it back in, and so needs it twice.
@functools.partial(
    jax.jit, static_argnames=("slot", "spec", "dtype"), donate_argnums=0)
def _put(stack, layer, key, slot, spec, dtype) -> types.Tree:
  return jax.tree.map(
      lambda all_, one: jax.lax.dynamic_update_index_in_dim(
          all_, one, layer, 0), stack, _one(key, slot, spec, dtype))


def assemble(
    config: config_lib.ModelConfig, leaves: dict[tuple[str, str], Any]
) -> decoder.Base:
  """A base from its leaves by (target, "weight" or "bias")."""

  def linear(target):
    return decoder.Linear(
        weight=leaves[target, "weight"], bias=leaves.get((target, "bias")))

  layers = {
      slot.target: (linear(slot.target) if slot.linear
                    else leaves[slot.target, "weight"])
      for slot in hf.slots(config) if slot.stacked and slot.leaf == "weight"}
  return decoder.Base(
      embed_tokens=leaves["embed_tokens", "weight"],
      layers=layers,
      norm=leaves["norm", "weight"],
      lm_head=None if config.tie_embeddings else linear("lm_head"))
