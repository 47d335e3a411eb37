"""Paths and shapes of what can be adapted, from a model's slots."""

from __future__ import annotations

import math

from lora_jax.adapters import base as base_lib
from lora_jax.models import config as config_lib
from lora_jax.models import hf

# Blocks of a layer, which an adapter may stand in or beside.
BLOCKS = ("self_attn", "mlp")
# The layer itself.
LAYER = "layer"
# The input, which is no module.
INPUT = "prompt"


def paths(config: config_lib.ModelConfig) -> dict[str, list[str]]:
  """Paths of all places that can be adapted, by target."""
  found = {}
  for slot in hf.slots(config):
    if slot.leaf == "weight":
      layers = range(config.n_layers) if slot.stacked else (None,)
      found[slot.target] = [
          hf.hf_name(layer, slot.target, "") for layer in layers]
  return found | {
      block: [f"model.layers.{layer}.{block}"
              for layer in range(config.n_layers)] for block in BLOCKS
  } | {LAYER: [f"model.layers.{layer}" for layer in range(config.n_layers)],
       INPUT: [INPUT]}


def geometry(config: config_lib.ModelConfig) -> base_lib.Geometry:
  """A model's sizes, as methods are told of them."""
  layer = [slot for slot in hf.slots(config) if slot.stacked]
  return base_lib.Geometry(
      d=config.d_model, f=config.d_ff, h=config.n_heads, k=config.n_kv_heads,
      e=config.head_dim, l=config.n_layers, v=config.vocab_size,
      embed_scale=config.embed_scale or 1.0,
      biased=tuple(slot.target for slot in hf.slots(config)
                   if slot.leaf == "bias"),
      parts=tuple((slot.target, hf.MODULES[slot.target], slot.leaf)
                  for slot in layer),
      fused=tuple(hf.FUSED.values()) if config.fused else (),
      p=sum(math.prod(slot.shape) for slot in layer),
      norm=1.0 - config.norm_offset)


def shapes(
    config: config_lib.ModelConfig) -> dict[str, tuple[int, ...]]:
  """(in, out) of projections, (v, d) of an embedding, (d,) of norms."""
  return {
      slot.target: slot.shape if slot.target == "embed_tokens"
      else slot.shape[::-1]
      for slot in hf.slots(config) if slot.leaf == "weight"
  } | dict.fromkeys((*BLOCKS, LAYER, INPUT), ())
