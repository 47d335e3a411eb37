"""Adapters that started out of the base's weights, in PEFT's terms.

W + s (A B - A0 B0) = (W - s A0 B0) + s A B: `[A | A0]` and `[B ; -B0]` are an
adapter of the original base, of twice the rank, with an alpha that leaves s as
it is. PEFT's `path_initial_model_for_weight_conversion` writes the same.
"""

from __future__ import annotations

from collections.abc import Mapping
import math
from typing import Any

import jax
import numpy as np

from lora_jax import mesh as mesh_lib
from lora_jax.adapters import base as base_lib
from lora_jax.adapters import runs


def convert(
    adapters: base_lib.Adapters, config: Mapping[str, Any]
) -> tuple[base_lib.Adapters, dict[str, Any]]:
  """An adapter of the original base in place of one of a replaced base.

  Args:
    adapters: with `a0` and `b0`; those without get zeros.
    config: `adapter_config.json`.

  Returns:
    The same two, for `peft.write`.

  Raises:
    errors.UserError: for a method whose change is no sum (DoRA).
  """

  def each_layer(stack, *span):
    del span
    layers = [jax.tree.map(lambda x, i=i: x[i], stack).difference()
              for i in range(len(stack.rank))]
    return jax.tree.map(lambda *x: np.stack(x), *layers)

  host = jax.tree.map(mesh_lib.fetch, adapters)
  ratio = math.sqrt(2) if config.get("use_rslora") else 2
  return host.replace(
      layers={k: runs.mapped(each_layer, v) for k, v in host.layers.items()},
      outer={k: v.difference() for k, v in host.outer.items()},
  ), {k: v for k, v in config.items() if k != "loftq_config"} | {
      "init_lora_weights": True,
      "r": 2 * config["r"],
      "lora_alpha": ratio * config["lora_alpha"],
      "rank_pattern": {
          k: 2 * v for k, v in config["rank_pattern"].items()},
      "alpha_pattern": {
          k: ratio * v for k, v in config["alpha_pattern"].items()}}
