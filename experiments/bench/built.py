"""The model that is measured: a random quantised base, adapters beside it."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax

from experiments import blocks
from experiments.bench import geometry
from lora_jax import adapters as adapters_lib
from lora_jax import types
from lora_jax.models import config as config_lib
from lora_jax.models import decoder
from lora_jax.models import init
from lora_jax.models import modules
from lora_jax.train import precision

Config = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Built:
  """A model on the device.

  Attributes:
    model: its geometry.
    base: the base, perhaps changed by the method's start.
    adapters: the whole tree.
    case: what the lines about it say.
  """

  model: config_lib.ModelConfig
  base: decoder.Base
  adapters: types.Tree
  case: dict[str, Any]


def build(config: Config) -> Built:
  """The model of a config; nothing is read from disk."""
  model = geometry.chosen(config["model"])
  spec, method = blocks.quant(config), blocks.adapter(config)
  dtype = config["compute"]["dtype"]
  base_dtype = precision.base_dtype(dtype, config["compute"]["base_dtype"])
  key = jax.random.key(config["seed"])
  base = init.quantised_base(
      key, model, spec, base_dtype, blocks.skip(config),
      "base" in blocks.offload(config))
  base, tree = adapters_lib.build(
      jax.random.fold_in(key, 1), method, base, modules.paths(model),
      geometry=modules.geometry(model))
  return Built(model, base, tree, {
      "geometry": config["model"]["geometry"],
      "changes": config["model"]["changes"],
      "format": spec.format, "double": spec.double,
      "method": method.method, "rank": method.rank,
      "targets": method.targets, "dtype": dtype,
      "attention": config["compute"]["attention"],
      "trainable": adapters_lib.trainable_size(tree)})
