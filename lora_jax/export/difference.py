"""Adapters that started out of the base's weights, in PEFT's terms.

W + s (A B - A0 B0) = (W - s A0 B0) + s A B: `[A | A0]` and `[B ; -B0]` are an
adapter of the original base, of twice the rank, with an alpha that leaves s as
it is. PEFT's `path_initial_model_for_weight_conversion` writes the same. Of
DoRA's V, which is that sum, the same holds, and its magnitudes stay.

What was taken out of the base by looking at rows cannot be made again from the
base alone. Such adapters are always written in this form: PEFT has nothing to
make, and A0 and B0 are in the file, for whoever knows that they are (`BEGAN`).
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

import jax
import numpy as np

from lora_jax import mesh as mesh_lib
from lora_jax.adapters import base as base_lib
from lora_jax.adapters import runs

# Keys of `adapter_config.json` that `convert` changes.
BEGAN = ("init_lora_weights", "r", "lora_alpha", "rank_pattern",
         "alpha_pattern")
# Tensors by suffix, and the axis along which A0 or -B0 lies beside A or B.
AXES = {"lora_A.weight": 0, "lora_B.weight": 1, "lora_embedding_A": 0,
        "lora_embedding_B": 1}


def convert(
    adapters: base_lib.Adapters, config: Mapping[str, Any]
) -> tuple[base_lib.Adapters, dict[str, Any]]:
  """An adapter of the original base in place of one of a replaced base.

  Args:
    adapters: with `a0` and `b0`; those without get zeros.
    config: `adapter_config.json`.

  Returns:
    The same two, for `peft.write`.
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


def halves(
    named: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """PEFT's tensors of (A, B) and of (A0, B0), of those of a difference.

  What is no factor (DoRA's magnitude) is in both.
  """
  now, then = {}, {}
  for name, value in named.items():
    axis = next((n for suffix, n in AXES.items() if name.endswith(suffix)),
                None)
    if axis is None:
      now[name] = then[name] = value
    else:
      now[name], start = np.split(value, 2, axis)
      then[name] = -start if axis else start
  return now, then


def rejoined(
    now: base_lib.Adapters, then: base_lib.Adapters) -> base_lib.Adapters:
  """Adapters with A0 and B0, of those of the two `halves`."""

  def one(adapter, start):
    if not hasattr(adapter, "a0"):
      return adapter
    return adapter.replace(a0=start.a, b0=start.b)

  def stacked(adapter, start):
    starts = iter([stack for stack, *_ in runs.each(start)])
    return runs.mapped(lambda stack, *span: one(stack, next(starts)), adapter)

  return dataclasses.replace(
      now,
      layers={k: stacked(v, then.layers[k]) for k, v in now.layers.items()},
      outer={k: v if k == "embed_tokens" else one(v, then.outer[k])
             for k, v in now.outer.items()})
