"""Devices in a mesh, and where each logical axis of an array lives on it.

One table: logical axis -> mesh axis. A weight whose size a mesh axis does not
divide is replicated along it; nothing else decides placement.

  data    rows of a batch; weights are replicated
  fsdp    rows of a batch too; weights are cut along their model width
  tensor  weights are cut along heads, MLP width and vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import math

import jax
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from lora_jax import errors
from lora_jax import types

AXES = ("data", "fsdp", "tensor")

RULES: dict[str | None, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "model": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    None: None,
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """The `mesh` block of a config: devices along each axis; -1 is the rest."""

  data: int = -1
  fsdp: int = 1
  tensor: int = 1


def make(config: MeshConfig, devices: Sequence | None = None) -> Mesh:
  """The mesh of a config over `devices` (all of them by default).

  Raises:
    errors.UsageError: if the sizes do not multiply to the device count.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = [config.data, config.fsdp, config.tensor]
  bad = any(s < 1 and s != -1 for s in sizes) or sizes.count(-1) > 1
  known = math.prod(s for s in sizes if s != -1)
  if not bad and -1 in sizes and len(devices) % known == 0:
    sizes[sizes.index(-1)] = len(devices) // known
  if bad or math.prod(sizes) != len(devices):
    raise errors.UsageError(
        f"mesh.data={config.data}, mesh.fsdp={config.fsdp}, mesh.tensor="
        f"{config.tensor} do not multiply to {len(devices)} devices; use -1 "
        "for one of them")
  return Mesh(np.asarray(devices).reshape(sizes), AXES)


def spec(
    mesh: Mesh, shape: Sequence[int], logical: Sequence[str | None]
) -> PartitionSpec:
  """Where an array of `shape` lives, its last axes named by `logical`.

  Args:
    mesh: the devices.
    shape: of the whole array.
    logical: keys of `RULES` for the last axes; those before (the stack of
      layers) are not cut.

  Returns:
    A spec that names only mesh axes which divide the array's.
  """
  names = [None] * (len(shape) - len(logical)) + list(logical)
  entries: list = []
  for size, name in zip(shape, names, strict=True):
    axes = RULES[name]
    axes = (axes,) if isinstance(axes, str) else axes or ()
    ways = math.prod(mesh.shape[a] for a in axes)
    entries.append(axes if ways > 1 and size % ways == 0 else None)
  return PartitionSpec(*entries)


def put(
    mesh: Mesh, array: types.Array, logical: Sequence[str | None]
) -> jax.Array:
  """`array` on the mesh."""
  return jax.device_put(
      array, NamedSharding(mesh, spec(mesh, array.shape, logical)))


def put_batch(mesh: Mesh, batch: types.Batch) -> types.Batch:
  """`[a, b, t]` (or `[b, t]`) fields, cut along `b`.

  Raises:
    errors.UsageError: if the mesh does not divide `b`.
  """
  rows = batch.tokens.shape[-2]
  ways = mesh.shape["data"] * mesh.shape["fsdp"]
  if rows % ways:
    raise errors.UsageError(
        f"train.batch_size={rows} is not a multiple of mesh.data * mesh.fsdp="
        f"{ways}; change one of them")
  return jax.tree.map(lambda x: put(mesh, x, ("batch", None)), batch)
