"""Arrays of a tree in an OCDBT database (TensorStore) of zarr3 arrays.

Each array is named by its path, `layers.q_proj.weight.codes`. Values are not
compressed. Each chunk ends with its crc32c, which is compared while the chunk
is read, by whoever reads it: a process of many checks what it needs and no
more. (OCDBT itself has checksums of its nodes, but none of values.) Chunks
hold one layer, or a near square of it, so that a mesh may cut a weight along
either axis.
"""

from __future__ import annotations

import collections
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from lora_jax import host as host_lib
from lora_jax import trees
from lora_jax import types
from lora_jax.models import sharding as sharding_lib

CHUNK_BYTES = 4 * 2**20
# What may be read ahead of the device, beside the array being placed.
AHEAD_BYTES = 2**30


class Failure(Exception):
  """What TensorStore said, in one line."""


def write(folder: pathlib.Path, tree: types.Tree) -> None:
  """Writes every leaf; this process must be able to read them whole.

  Raises:
    Failure: if they cannot be written.
  """
  for path, leaf in trees.paths(tree).items():
    store = _result(_open(folder, path, leaf.shape, leaf.dtype, create=True))
    _result(store.write(np.asarray(leaf)))


def read(
    folder: pathlib.Path, template: types.Tree, mesh: Mesh | None = None,
    host: bool = False
) -> types.Tree:
  """The leaves of a tree of `jax.ShapeDtypeStruct`s.

  Args:
    folder: that `write` was given.
    template: their structure, shapes and types.
    mesh: the devices, each process reading what its own hold; the default
      device if None.
    host: whether the matrices of layers go to host memory; see
      `host_lib.placed`.

  Raises:
    Failure: if a chunk is missing or is not what was written.
  """
  pending: collections.deque = collections.deque()
  leaves, ahead = [], 0
  named = trees.paths(template)
  places = [None] * len(named) if mesh is None else jax.tree.leaves(
      sharding_lib.shardings(mesh, template))
  for (path, leaf), where in zip(named.items(), places, strict=True):
    if host and path.startswith("layers.") and not host_lib.stays(leaf):
      where = host_lib.home(where or host_lib.default())
    pending.append((leaf, *_start(folder, path, leaf, where)))
    ahead += trees.nbytes(leaf)
    while ahead > AHEAD_BYTES and len(pending) > 1:
      ahead -= trees.nbytes(pending[0][0])
      leaves.append(_finish(*pending.popleft()))
  leaves += [_finish(*one) for one in pending]
  return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _result(future):
  try:
    return future.result()
  except (ValueError, OSError, NotImplementedError) as error:
    line = " ".join(str(error).split())
    raise Failure(line.partition(" [")[0][:300]) from None


def _start(folder, path, leaf, where):
  """Begins to read a leaf: its place, and a future of what this process holds.

  That is one box around the parts of all its devices.
  """
  store = _result(_open(folder, path, leaf.shape, leaf.dtype))
  if where is None or len(where.device_set) == 1:
    return where, None, *_into_memory(store)
  parts = [
      [part.indices(n)[:2] for part, n in zip(index, leaf.shape, strict=True)]
      for index in where.addressable_devices_indices_map(leaf.shape).values()
      if index is not None]
  box = tuple(
      slice(min(a for a, _ in axis), max(b for _, b in axis))
      for axis in zip(*parts, strict=True))
  return where, box, *_into_memory(store[box])


def _into_memory(store) -> tuple[np.ndarray, Any]:
  """An array that is being filled, and the future that says it is.

  A CPU device takes memory at multiples of 64 bytes as it is, and copies
  other.
  """
  import tensorstore

  dtype = store.dtype.numpy_dtype
  size = int(np.prod(store.shape, dtype=np.int64)) * dtype.itemsize
  raw = np.empty(size + 64, np.uint8)
  first = -raw.ctypes.data % 64
  found = raw[first:first + size].view(dtype).reshape(store.shape)
  if store.rank:
    store = store[tensorstore.d[:].translate_to[0]]
  return found, tensorstore.array(found).write(store)


def _finish(leaf, where: Any, box: Any, found, future) -> jax.Array:
  _result(future)
  if box is None:
    return jax.device_put(found, where)

  def part(index):
    return found[tuple(
        slice(*(k - side.start for k in one.indices(n)[:2]))
        for one, n, side in zip(index, leaf.shape, box, strict=True))]

  return jax.make_array_from_callback(leaf.shape, where, part)


def _open(folder, path, shape, dtype, create=False):
  import tensorstore

  spec = {
      "driver": "zarr3",
      "kvstore": {
          "driver": "ocdbt",
          "base": {"driver": "file", "path": str(folder)},
          "path": f"{path}/"},
      "metadata": {
          "shape": list(shape),
          "data_type": jnp.dtype(dtype).name,
          "chunk_grid": {
              "name": "regular", "configuration": {
                  "chunk_shape": chunk(shape, jnp.dtype(dtype).itemsize)}},
          "codecs": [{"name": "bytes", "configuration": {"endian": "little"}},
                     {"name": "crc32c"}]},
      # A chunk that is not there is an error, and no zeros.
      "store_data_equal_to_fill_value": True,
      "fill_missing_data_reads": False,
  }
  if create:
    return tensorstore.open(spec, create=True, open=False)
  # The manifest says it all, and is checked: no need to read it twice.
  return tensorstore.open(spec, open=True, assume_metadata=True)


def chunk(shape: tuple[int, ...], itemsize: int) -> list[int]:
  """`(32, 2048, 4096), 1 -> [1, 2048, 2048]`: at most `CHUNK_BYTES`.

  Stacks are cut by layers first, then the longest axis into halves that are
  equal.
  """
  found = [max(n, 1) for n in shape]
  size = lambda: itemsize * int(np.prod(found, dtype=np.int64))
  while len(found) > 2 and found[0] > 1 and size() > CHUNK_BYTES:
    found[0] = -(-found[0] // 2)
  while size() > CHUNK_BYTES:
    axis = int(np.argmax(found))
    found[axis] = -(-found[axis] // 2)
  return found
