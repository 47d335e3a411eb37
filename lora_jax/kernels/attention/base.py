"""What an implementation of attention is given, and helpers for several.

An implementation is a module with two functions:

  refuses(call) -> str | None   why it cannot compute this call, or None
  run(call) -> [b, t, h, e]

`refuses` looks at static things only: platform, types, shapes, options.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lora_jax import keep as keep_lib
from lora_jax import mesh as mesh_lib
from lora_jax import types

T = TypeVar("T")
LAYOUTS = {
    "any": "positions and segments say everything",
    "packed": "key i is query i's token; segments are contiguous",
    "single": "packed, with one segment a row and padding only after it",
}

# Logical axes of queries, keys and values; of a number for each query and head,
# and for each token.
Axes = tuple[str | None, ...]
HEADS: Axes = ("batch", None, "heads", None)
SUMS: Axes = ("batch", "heads", None)
TOKENS: Axes = ("batch", None)


@dataclasses.dataclass(frozen=True)
class Options:
  """Static choices; hashable, so that a jitted function can take them.

  The layout is what the caller knows about every row before it sees one. Only
  with it can a kernel work out the mask from indices, block by block:

    any     nothing; the mask comes from positions and segments
    packed  key i belongs to query i's token (there may be later keys, which
            are not seen), a segment's tokens are contiguous and in order;
            padding is a segment as well
    single  packed, and each row is one segment followed by padding

  What comes out at padding means nothing, but is finite, and no other token
  ever sees a key of padding: in these layouts it comes later, or belongs to
  another segment.

  Attributes:
    implementation: a key of `api.CHOICES`.
    layout: `any`, `packed` or `single`.
    windows: all values that a traced window can take, ascending; empty if
      they are not known.
    mesh: devices that rows and heads are spread over, or None for one.
    mapped: whether `vmap` adds an axis; `auto` then takes what has a rule.
  """

  implementation: str = "auto"
  layout: str = "any"
  windows: tuple[int, ...] = ()
  mesh: Mesh | None = None
  mapped: bool = False


@dataclasses.dataclass(frozen=True)
class Call:
  """One call of attention; see `api.attention` for the fields."""

  q: types.Array
  k: types.Array
  v: types.Array
  q_positions: types.Array
  kv_positions: types.Array
  q_segments: types.Array
  kv_segments: types.Array
  window: types.Array | int | None = None
  scale: float | None = None
  softcap: float | None = None
  options: Options = Options()
  keep: keep_lib.Keep = keep_lib.named

  @property
  def device(self) -> Any:
    """One of the devices that will compute it."""
    mesh = self.options.mesh
    return jax.devices()[0] if mesh is None else mesh.devices.flat[0]

  @property
  def windows(self) -> tuple[int, ...] | None:
    """All values of the window, empty without one; None if not known."""
    if self.window is None:
      return ()
    if isinstance(self.window, int):
      return (self.window,)
    return self.options.windows or None

  def aligned(self) -> tuple[types.Array, types.Array]:
    """Keys and values of the queries' own tokens, `[b, t, k, e]`."""
    t = self.q.shape[1]
    return self.k[:, :t], self.v[:, :t]


def compute_capability(device: Any) -> tuple[int, int] | None:
  """(9, 0) of an NVIDIA H100; None for what is not an NVIDIA GPU."""
  if device.platform not in ("gpu", "cuda"):
    return None
  try:
    major, minor = str(device.compute_capability).split(".")
    return int(major), int(minor)
  except (AttributeError, ValueError):  # AMD's are called gfx90a.
    return None


def unaligned(call: Call) -> str | None:
  """Why the mask of a call does not follow from indices, or None."""
  if call.options.layout == "any":
    return "the caller does not know that rows are packed or single"
  if call.k.shape[1] < call.q.shape[1]:
    return (f"{call.k.shape[1]} keys are fewer than the "
            f"{call.q.shape[1]} queries")
  return None


def unshardable(call: Call) -> str | None:
  """Why a mesh cannot cut a call by rows and heads, or None."""
  mesh = call.options.mesh
  if mesh is None or mesh.size == 1:
    return None
  rows = mesh.shape["data"] * mesh.shape["fsdp"]
  if call.q.shape[0] % rows:
    return (f"{call.q.shape[0]} rows are not a multiple of mesh.data * "
            f"mesh.fsdp={rows}")
  if call.k.shape[2] % mesh.shape["tensor"]:
    return (f"{call.k.shape[2]} key/value heads are not a multiple of "
            f"mesh.tensor={mesh.shape['tensor']}")
  return None


def sharded(
    mesh: Mesh | None, kernel: Callable[..., Any], *arguments: types.Array,
    axes: Sequence[Axes], out: Any = HEADS,
) -> Any:
  """`kernel(*arguments)` on each device's rows and heads.

  XLA cannot look into a custom call, and would gather its operands.

  Args:
    mesh: what `unshardable` accepts.
    kernel: computes each row and each group of heads by itself.
    *arguments: arrays; the first has the queries' axes.
    axes: the logical axes of each.
    out: those of the result, or of each of several.

  Returns:
    The result.
  """
  if mesh is None or mesh.size == 1:
    return kernel(*arguments)
  sizes = dict(zip(axes[0], arguments[0].shape, strict=True))

  def spec(names):
    return mesh_lib.spec(mesh, [sizes[name] for name in names], names)

  # Kernels say nothing about which axes their results vary over.
  return jax.shard_map(
      kernel, mesh=mesh,
      in_specs=tuple(mesh_lib.spec(mesh, x.shape, names)
                     for x, names in zip(arguments, axes, strict=True)),
      out_specs=spec(out) if out == HEADS else tuple(map(spec, out)),
      check_vma=False)(*arguments)


def placed(
    mesh: Mesh | None, x: types.Array, logical: Sequence[str | None]
) -> types.Array:
  """`x` with its logical axes cut by the mesh, for a call that XLA can cut."""
  if mesh is None or mesh.size == 1:
    return x
  return jax.lax.with_sharding_constraint(x, jax.sharding.NamedSharding(
      mesh, mesh_lib.spec(mesh, x.shape, logical)))


def wide_on_cpu(
    attend: Callable[..., types.Array],
    *operands: types.Array,
    dtypes: Sequence[Any] = (jnp.float16,),
) -> types.Array:
  """`attend(*operands)`; on CPUs in float32, if it is of one of `dtypes`.

  XLA's CPU backend has no float16 product with a float32 sum, and of bfloat16
  only some.
  """
  dtype = operands[0].dtype
  if dtype not in dtypes:
    return attend(*operands)

  def wide(*operands):
    out = attend(*(x.astype(jnp.float32) for x in operands))
    return out.astype(dtype)

  return jax.lax.platform_dependent(*operands, cpu=wide, default=attend)


def starts(segments: types.Array) -> types.Array:
  """Index of the first token of each token's segment.

  Example: [[1, 1, 2, 2, 2, 0]] -> [[0, 0, 2, 2, 2, 5]].

  Args:
    segments: `[b, t]`, contiguous.

  Returns:
    `[b, t]` int32.
  """
  index = jnp.arange(segments.shape[1], dtype=jnp.int32)
  first = segments[:, 1:] != segments[:, :-1]
  first = jnp.pad(first, ((0, 0), (1, 0)))
  return jax.lax.cummax(jnp.where(first, index, 0), axis=1)


def each_window(
    call: Call, run: Callable[[int | None], T]
) -> T:
  """`run` of the window as a Python integer, also where it is traced.

  A stack of layers scanned over passes a traced window that takes one of few
  values. The device chooses among as many programs.

  Args:
    call: `windows` is known.
    run: computes the call with a window, None if it reaches over the row.

  Returns:
    What it returns.
  """
  t, windows = call.q.shape[1], call.windows or ()
  reach = [w if w < t else None for w in windows]
  if len(set(reach)) <= 1:
    return run(reach[0] if reach else None)
  index = jnp.searchsorted(
      jnp.asarray(windows, jnp.int32), jnp.asarray(call.window))
  return jax.lax.switch(index, [functools.partial(run, w) for w in reach])
