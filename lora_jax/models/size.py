"""What a base will take of the devices, before it is read."""

from __future__ import annotations

from collections.abc import Sequence
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lora_jax import quant
from lora_jax.models import base_store
from lora_jax.models import base_tree
from lora_jax.models import init
from lora_jax.models import load
from lora_jax.models import sharding


def nbytes(
    source: load.Source,
    spec: quant.QuantSpec | None = None,
    dtype: Any = jnp.float32,
    skip: Sequence[str] = load.SKIP,
    mesh: Mesh | None = None,
) -> int:
  """Bytes of the base that `load.convert` makes, on each device.

  Of a checkpoint that keeps its own codes these are those of its files, shared
  out evenly.

  Args:
    source, spec, dtype, skip, mesh: as there.
  """
  if isinstance(source, base_store.Stored):
    tree = base_tree.template(source.manifest["tree"])
  elif source.scheme and not (spec and spec.format == "none"):
    ways = 1 if mesh is None else mesh.shape["fsdp"] * mesh.shape["tensor"]
    return sum(path.stat().st_size for path in source.files) // ways
  else:
    tree = jax.eval_shape(functools.partial(
        init.quantised_base, config=source.config,
        spec=spec or quant.QuantSpec("none"), dtype=dtype, skip=skip),
                          jax.random.key(0))
  shapes = [x.shape for x in jax.tree.leaves(tree)] if mesh is None else [
      where.shard_shape(x.shape) for x, where in zip(
          *map(jax.tree.leaves, (tree, sharding.shardings(mesh, tree))),
          strict=True)]
  return sum(math.prod(shape) * x.dtype.itemsize
             for shape, x in zip(shapes, jax.tree.leaves(tree), strict=True))
