"""Full fine-tuning and no training at all, as methods like any other.

`full` trains every parameter of the base: they leave the frozen tree and are
held, in float32, as overrides of it. It is the yardstick that adapters are
compared with, on the same data and step. `none` trains nothing; such a run
evaluates.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lora_jax import errors
from lora_jax import host as host_lib
from lora_jax import quant
from lora_jax import types
from lora_jax.adapters import base
from lora_jax.adapters import method


def build_full(
    tree: types.Tree, overrides: types.Tree | None = None
) -> tuple[types.Tree, base.Adapters]:
  """(a base without leaves, adapters whose overrides are its weights).

  Args:
    tree: the base; quantised weights are dequantised.
    overrides: weights to start from instead (e.g. from a checkpoint).

  Returns:
    The two trees; `trees.combine(adapters.overrides, base)` is the model.

  Raises:
    errors.UsageError: if layers of the base are in host memory.
  """
  if any(map(host_lib.in_host, jax.tree.leaves(tree))):
    raise errors.UsageError(
        'compute.offload="base" keeps frozen layers in host memory, and '
        "adapter.method=full freezes none; leave it out, or use lora")
  is_leaf = lambda x: isinstance(x, quant.QuantizedArray)
  if overrides is None:
    overrides = jax.tree.map(
        lambda w: quant.dequantize(w, jnp.float32),
        tree, is_leaf=is_leaf)
  empty = jax.tree.map(lambda w: None, tree, is_leaf=is_leaf)
  return empty, base.Adapters(overrides=overrides)


def build_none(tree: types.Tree) -> tuple[types.Tree, base.Adapters]:
  """(the base as it is, an empty tree)."""
  return tree, base.Adapters()


NONE = method.Method(
    summary="h = x W0; nothing is trained", build=build_none)
METHOD = method.Method(
    summary="h = x W; every parameter is trained", count="i * o",
    build=build_full)
