"""Random bases: for tests, benchmarks and pretraining from nothing."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

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
    shape = slot.shape[::-1] if slot.linear else slot.shape
    if slot.stacked:
      shape = (config.n_layers, *shape)
    noise = jax.random.normal(sub, shape, jnp.float32)
    if slot.linear:
      value = noise / math.sqrt(slot.shape[1])
    elif slot.leaf == "bias":
      value = noise / 4
    elif slot.target == "embed_tokens":
      value = noise
    else:
      value = 1 + noise / 8
    drawn[slot.target, slot.leaf] = value.astype(dtype)
  return assemble(config, drawn)


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
