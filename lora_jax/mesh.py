"""Devices in a mesh, and where each logical axis of an array lives on it.

One table: logical axis -> mesh axis. A weight whose size a mesh axis does not
divide is replicated along it; nothing else decides placement.

  data    rows of a batch; weights are replicated
  fsdp    rows of a batch too; weights are cut along their model width, and
          gathered, a layer at a time, where they are used
  tensor  weights are cut along heads, MLP width and vocabulary

The fields of a dataclass name their axes: `codes: Array = axes("in", "out")`.
What "in" and "out" are is known to the module that holds the weight (see
`models.sharding`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from lora_jax import errors
from lora_jax import struct
from lora_jax import types

AXES = ("data", "fsdp", "tensor")

RULES: dict[str | None, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "requests": "data",
    "model": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    None: None,
}
# Of a layer's weights while they are used.
GATHERED = RULES | {"model": None}


def axes(*names: str | None, **options: Any) -> Any:
  """A dataclass field whose last axes are called `names`.

  Args:
    *names: "in" or "out" of the weight's own axes, a key of `RULES`, or None
      for an axis that is never cut.
    **options: of `struct.field`.
  """
  metadata = options.pop("metadata", {}) | {"axes": names}
  return struct.field(metadata=metadata, **options)


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
    mesh: Mesh,
    shape: Sequence[int],
    logical: Sequence[str | None],
    rules: Mapping = RULES,
) -> PartitionSpec:
  """Where an array of `shape` lives, its last axes named by `logical`.

  Args:
    mesh: the devices.
    shape: of the whole array.
    logical: keys of `RULES` for the last axes; those before (the stack of
      layers) are not cut.
    rules: the table.

  Returns:
    A spec that names only mesh axes which divide the array's.
  """
  names = [None] * (len(shape) - len(logical)) + list(logical)
  entries: list = []
  for size, name in zip(shape, names, strict=True):
    along = rules[name]
    along = (along,) if isinstance(along, str) else along or ()
    parts = math.prod(mesh.shape[a] for a in along)
    entries.append(along if parts > 1 and size % parts == 0 else None)
  return PartitionSpec(*entries)


def place(
    array: types.Array, sharding: jax.sharding.Sharding) -> jax.Array:
  """`array`, the same in every process, on the devices of all of them.

  Args:
    array: on the host, on this process' devices, or already on all devices.
    sharding: where it goes.
  """
  whole = isinstance(array, jax.Array) and not array.is_fully_addressable
  if whole or jax.process_count() == 1:
    return jax.device_put(array, sharding)
  host = np.asarray(array)
  return jax.make_array_from_callback(
      host.shape, sharding, lambda index: host[index])


def fetch(array: types.Array) -> np.ndarray:
  """The whole of `array` on the host, in every process.

  All processes must ask, in the same order: parts of other processes come
  over the network.
  """
  if isinstance(array, jax.Array) and not (
      array.is_fully_addressable or array.is_fully_replicated):
    from jax.experimental import multihost_utils

    array = multihost_utils.process_allgather(array, tiled=True)
  return np.asarray(array)


def put(
    mesh: Mesh, array: types.Array, logical: Sequence[str | None]
) -> jax.Array:
  """`array` on the mesh."""
  return place(array, NamedSharding(mesh, spec(mesh, array.shape, logical)))


def ways(mesh: Mesh | None) -> int:
  """Into how many parts the rows of a batch are cut."""
  return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def put_batch(mesh: Mesh, batch: types.Batch) -> types.Batch:
  """`[a, b, t]` (or `[b, t]`) fields, cut along `b`.

  Raises:
    errors.UsageError: if the mesh does not divide `b`.
  """
  rows = batch.tokens.shape[-2]
  parts = ways(mesh)
  if rows % parts:
    raise errors.UsageError(
        f"train.batch_size={rows} is not a multiple of mesh.data * mesh.fsdp="
        f"{parts}; change one of them")
  return jax.tree.map(lambda x: put(mesh, x, ("batch", None)), batch)
