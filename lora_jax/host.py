"""The device's memory and its host's: what lives where, and how it moves.

An array's type says which of the two it is in, under `jit` as well. Nothing
else is needed to know what has to be moved: code that may meet either calls
`on_device` where a value is used, which does nothing to what is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

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
# Platforms whose memories are all the same: what moves frees nothing.
ONE_MEMORY = ("cpu",)
# `(x, away)`: x in host memory if it is to be away, else on the device.
Mover = Callable[[types.Array, bool], types.Array]


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
  """The same place in the host's memory.

  On a mesh, if of one device: what `jax.ShapeDtypeStruct` says of memory is
  heard only there.
  """
  if isinstance(sharding, jax.sharding.SingleDeviceSharding):
    mesh = jax.sharding.Mesh(list(sharding.device_set), ("device",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  return sharding.with_memory_kind(PINNED)


def is_away(x: types.Array) -> bool:
  """`in_host` of arrays that may be `jax.ShapeDtypeStruct`s."""
  where = getattr(x, "sharding", None)
  return where is not None and where.memory_kind == PINNED


def _on_mesh(x: types.Array) -> bool:
  return isinstance(getattr(x, "sharding", None), jax.sharding.NamedSharding)


def _there(x: types.Array, away: bool) -> jax.sharding.Sharding:
  where = home(getattr(x, "sharding", None) or default())
  return where if away else where.with_memory_kind("device")


def described(x: types.Array, away: bool) -> types.Array:
  """A `Mover` that moves nothing: of what would move, shape and place."""
  if is_away(x) == away:
    return x
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_there(x, away))


def moved(x: types.Array, away: bool) -> types.Array:
  """A `Mover`; whoever holds what moves holds it where it was, as well."""
  return x if is_away(x) == away else jax.device_put(x, _there(x, away))


def handed_over(x: types.Array, away: bool) -> types.Array:
  """A `Mover` that deletes what it has moved, one array after another."""
  found = moved(x, away)
  if found is not x:
    found.block_until_ready()
    x.delete()
  return found


def base_by(move: Mover, base: types.Tree, away: bool) -> types.Tree:
  """A base whose layers' matrices are where `away` says.

  Args:
    move: how they get there.
    base: with `layers`, stacked; `[l, n]` stays on the device (`stays`).
    away: whether that is host memory.
  """
  return base.replace(layers=jax.tree.map(
      lambda x: x if stays(x) else move(x, away), base.layers))


def state_by(move: Mover, state: types.Tree, away: bool) -> types.Tree:
  """Optimiser states, all but scalars where `away` says; see `base_by`."""
  return jax.tree.map(lambda x: move(x, away) if x.ndim else x, state)


def beside(state: types.Tree, *trees: types.Tree) -> types.Tree:
  """A state on a mesh, if something of `trees` is on one; see `home`.

  What comes out of a step then is on it, too, and the program of the next
  step would be another.
  """
  if not any(map(_on_mesh, jax.tree.leaves((state, trees)))):
    return state
  return jax.tree.map(
      lambda x: x if _on_mesh(x) else jax.device_put(
          x, _there(x, is_away(x))), state)


def placed(base: types.Tree) -> types.Tree:
  """A base whose layers' matrices are in the host's memory."""
  return base_by(moved, base, True)


def movable(base: types.Tree, donated: bool) -> tuple[str, ...]:
  """Which `KINDS` a step may have moved to make room on its devices.

  Args:
    base: the frozen base, with `layers`.
    donated: whether nobody else holds it, so that moving it frees memory.
  """
  matrices = [x for x in jax.tree.leaves(base.layers) if not stays(x)]
  free = matrices and (donated or all(map(is_away, matrices)))
  return tuple(kind for kind in KINDS if free or kind != "base")


def all_apart() -> bool:
  """Whether all devices have host memory beside their own."""
  return all(
      device.platform not in ONE_MEMORY and PINNED in {
          memory.kind for memory in device.addressable_memories()}
      for device in jax.local_devices())
