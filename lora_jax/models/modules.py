"""Paths and shapes of what can be adapted, from a model's slots."""

from __future__ import annotations

from lora_jax.models import config as config_lib
from lora_jax.models import hf


def paths(config: config_lib.ModelConfig) -> dict[str, list[str]]:
  """Paths of a model's projections and outer modules, by target."""
  found = {}
  for slot in hf.slots(config):
    if slot.leaf == "weight" and len(slot.shape) == 2:
      layers = range(config.n_layers) if slot.stacked else (None,)
      found[slot.target] = [
          hf.hf_name(layer, slot.target, "") for layer in layers]
  return found


def shapes(
    config: config_lib.ModelConfig) -> dict[str, tuple[int, int]]:
  """(in, out) of the same; an embedding's are (v, d)."""
  return {
      slot.target: slot.shape if slot.target == "embed_tokens"
      else slot.shape[::-1]
      for slot in hf.slots(config)
      if slot.leaf == "weight" and len(slot.shape) == 2}
