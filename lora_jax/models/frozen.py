"""A frozen model, and what of it is computed with beside adapters."""

from __future__ import annotations

import dataclasses
from typing import Any

from lora_jax import adapters as adapters_lib
from lora_jax import mesh as mesh_lib
from lora_jax import struct
from lora_jax import trees
from lora_jax import types


@struct.dataclass
class Linear:
  """A frozen projection.

  Attributes:
    weight: `[i, o]`, an array or a `quant.QuantizedArray`; `[l, i, o]` when
      stacked.
    bias: `[o]` (`[l, o]`), or None.
  """

  weight: Any = mesh_lib.axes("in", "out")
  bias: types.Array | None = mesh_lib.axes("out", default=None)


@struct.dataclass
class Base:
  """A frozen model.

  Attributes:
    embed_tokens: `[v, d]`.
    layers: by Hugging Face's module name without parents: `Linear`s for
      q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, and
      arrays for input_layernorm, post_attention_layernorm `[l, d]`,
      pre_feedforward_layernorm, post_feedforward_layernorm `[l, d]` (if
      `config.post_norms`), q_norm, k_norm `[l, e]` (if `config.qk_norm`).
    norm: `[d]`, before the head.
    lm_head: a `Linear` `[d, v]`, or None if it is the embedding transposed.
  """

  embed_tokens: types.Array = mesh_lib.axes("in", "out")
  layers: dict[str, Any] = mesh_lib.axes()
  norm: types.Array = mesh_lib.axes(None)
  lm_head: Linear | None = None


def head_parts(
    base: Base | None, adapters: adapters_lib.Adapters | None
) -> tuple[Base | None, adapters_lib.Adapters | None]:
  """What of a base and of adapters `unembed` reads: all but the layers."""
  if base is not None:
    base = dataclasses.replace(base, layers={})
  if adapters is None:
    return base, None
  shared, overrides = adapters.shared, adapters.overrides
  if overrides is not None:
    overrides = dataclasses.replace(overrides, layers={})
  if adapters_lib.reader(adapters) is not None:
    shared = None
  return base, dataclasses.replace(
      adapters, layers={}, overrides=overrides, shared=shared)


def combined(base: Base, adapters: adapters_lib.Adapters | None) -> Base:
  """The base with the weights that `adapters` trains in their places."""
  if adapters is None or adapters.overrides is None:
    return base
  return trees.combine(adapters.overrides, base)
