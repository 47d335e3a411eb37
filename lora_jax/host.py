"""The device's memory and its host's: what lives where, and how it moves.

An array's type says which of the two it is in, under `jit` as well. Nothing
else is needed to know what has to be moved: code that may meet either calls
`on_device` where a value is used, which does nothing to what is there.
"""

from __future__ import annotations

from collections.abc import Iterable

import jax

from lora_jax import errors
from lora_jax import types

# What can be kept out of the device's memory; see `configs/common.py`.
KINDS: dict[str, str] = {
    "base": "matrices of the frozen layers; a layer is on the device while "
            "it computes and the next while it is copied",
    "activations": "what the backward pass keeps of a layer",
    "optimiser": "optimiser states, between steps",
}
HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device
PINNED = "pinned_host"


def kinds(names: Iterable[str]) -> tuple[str, ...]:
  """Keys of `KINDS`, each once and in the table's order.

  Raises:
    errors.UsageError: for an unknown one.
  """
  names = tuple(names)
  for name in names:
    errors.choose("compute.offload", name, KINDS)
  return tuple(kind for kind in KINDS if kind in names)


def check(offload: Iterable[str], device: jax.Device) -> tuple[str, ...]:
  """`kinds`; raises `errors.UserError` if a device has no host memory."""
  offload = kinds(offload)
  found = {memory.kind for memory in device.addressable_memories()}
  if offload and PINNED not in found:
    raise errors.UserError(
        f'compute.offload={",".join(offload)}: {device.device_kind} has no '
        f"{PINNED} memory; leave it empty, and use compute.remat=full or a "
        "smaller train.batch_size with train.accumulation")
  return offload


def in_host(x: types.Array) -> bool:
  """Whether an array, traced or not, is in the host's memory."""
  return jax.typeof(x).memory_space == HOST


def on_device(tree: types.Tree) -> types.Tree:
  """With what is in the host's memory moved to the device."""
  return jax.tree.map(
      lambda x: jax.device_put(x, DEVICE) if in_host(x) else x, tree)


def on_host(tree: types.Tree) -> types.Tree:
  """With every array but scalars moved to the host's memory, cut as it is."""
  return jax.tree.map(
      lambda x: x if in_host(x) or not x.ndim else jax.device_put(x, HOST),
      tree)


def stays(x: types.Array) -> bool:
  """Whether a leaf of stacked layers is too small to be worth its copies.

  `[l, n]` are norms, biases, or what nested statistics hang on: vectors, of a
  few thousandths of the whole.
  """
  return len(x.shape) < 3


def default() -> jax.sharding.Sharding:
  """Where arrays go that nothing else is said of."""
  return jax.numpy.zeros(()).sharding


def home(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
  """The same place in the host's memory."""
  return sharding.with_memory_kind(PINNED)


def placed(base: types.Tree) -> types.Tree:
  """A base whose layers' matrices are in the host's memory.

  Args:
    base: with `layers`, stacked; those that are there already stay.
  """

  def move(x):
    if stays(x) or in_host(x):
      return x
    return jax.device_put(x, home(x.sharding))

  return base.replace(layers=jax.tree.map(move, base.layers))
