"""Codes to weights: the one place where a kernel or plain XLA is chosen.

The platform that the program is compiled for decides, not the machine it is
traced on, so that a program for TPU can be compiled anywhere. A kernel is the
default on TPU and on Hopper. There, of bytes read and written a second by one
call that spans 0.5 GB, beside a copy's 3018 (H100 80GB HBM3, jax 0.11.2,
blocks of 64, bfloat16, median of 5):

                       4096x4096  4096x11008  14336x4096  8192x28672
    nf4   plain XLA         2020        1986        1983        1967  GB/s
          mosaic_gpu        2416        2423        2470        2434
          direct_gpu        2874        2827        2854        2869
    int4  mosaic_gpu        2896        2847        2855        2855
          direct_gpu        2848        2898        2843        2872

`python -m tests.kernels.dequantise_gpu` measures them again. `mosaic_gpu` is
what remains for shapes that `direct_gpu` does not take.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Any

import jax
from jax import custom_batching
import jax.numpy as jnp

from lora_jax import errors
from lora_jax.kernels import direct_gpu
from lora_jax.kernels import mosaic_gpu
from lora_jax.kernels import mosaic_tpu
from lora_jax.kernels import partition
from lora_jax.kernels import plain

_log = logging.getLogger(__name__)

KERNELS: dict[str, Any] = {
    "mosaic_tpu": mosaic_tpu, "mosaic_gpu": mosaic_gpu,
    "direct_gpu": direct_gpu}
# Lowering platform -> the kernels it may get: the first that applies.
DEFAULTS: dict[str, tuple[str, ...]] = {
    "tpu": ("mosaic_tpu",), "cuda": ("direct_gpu", "mosaic_gpu")}
_ANY = "any"


@dataclasses.dataclass(frozen=True)
class _Call:
  """What is static of a call: `names` of the statistics, in order.

  Its operands are the codes, the statistics and, if `below`, more rows.
  """

  form: plain.Format
  names: tuple[str, ...]
  dtype: jnp.dtype
  interpret: Any = False
  below: bool = False

  def plain(self, codes: jax.Array, *rest: jax.Array) -> jax.Array:
    named = dict(zip(self.names, rest))
    values = plain.dequantise(codes, named, self.form, self.dtype)
    return (jnp.concatenate([values, rest[-1]], axis=-2) if self.below
            else values)

  def applies(self, backend: str, codes: jax.Array) -> bool:
    """Whether the kernel `backend` takes codes of this shape."""
    form = self.form
    if form.levels is None or self.names not in (
        ("scales",), ("scales", "minimums")):
      return False
    rows, columns = codes.shape[-2] * form.codes_per_byte, codes.shape[-1]
    return KERNELS[backend].applies(
        rows, columns, min(form.block_size, rows), self.dtype)

  def kernel(
      self, backend: str, codes: jax.Array, *rest: jax.Array
  ) -> jax.Array:
    """`[..., i, o]` by a kernel, or plain where a shard does not fit it."""
    if not self.applies(backend, codes):
      return self.plain(codes, *rest)
    *lead, byte_rows, columns = codes.shape
    flat = [x.reshape(-1, *x.shape[-2:]) for x in (codes, *rest)]
    more = flat.pop() if self.below else None
    values = KERNELS[backend].dequantise(
        *flat, levels=self.form.levels,
        block_size=min(self.form.block_size, 2 * byte_rows),
        dtype=self.dtype, below=0 if more is None else more.shape[-2],
        interpret=self.interpret)
    if more is not None:  # In place: the kernel left these rows alone.
      values = jax.lax.dynamic_update_slice_in_dim(
          values, more, 2 * byte_rows, axis=-2)
    return values.reshape(*lead, -1, columns)


def not_hopper() -> bool:
  """Whether this machine's GPU is one that the kernel was not tried on. A
  machine without any compiles for another."""
  return jax.default_backend() == "gpu" and str(getattr(
      jax.local_devices()[0], "compute_capability", "")) != "9.0"


@functools.cache
def _compiled(call: _Call, platforms: tuple[tuple[str, str], ...]) -> Any:
  """A function of codes and statistics that takes the kernel of the platform
  it is compiled for; `_ANY` is every platform."""

  def placed(platform, backend, codes):
    run = functools.partial(call.kernel, backend)
    if platform == "tpu":
      return partition.local(run, call.plain)
    rows = codes.shape[-2] * call.form.codes_per_byte
    return partition.partitioned(
        run, min(call.form.block_size, rows), call.below)

  def choose(codes, *statistics):
    kernels = {platform: placed(platform, backend, codes)
               for platform, backend in platforms}
    if _ANY in kernels:
      return kernels[_ANY](codes, *statistics)
    return jax.lax.platform_dependent(
        codes, *statistics, default=call.plain, **kernels)

  # Kernels have no batching rule that keeps them one launch, nor derivatives.
  batched = custom_batching.custom_vmap(choose)

  @batched.def_vmap
  def _(size, is_batched, *args):
    return batched(*[
        x if b else jnp.broadcast_to(x, (size, *x.shape))
        for x, b in zip(args, is_batched, strict=True)]), True

  @jax.custom_jvp
  def run(codes, *statistics):
    return batched(codes, *statistics)

  @run.defjvp
  def _(primals, tangents):
    codes, *statistics = primals
    _, tangent = jax.jvp(
        functools.partial(call.plain, codes), tuple(statistics),
        tuple(tangents[1:]))
    return run(*primals), tangent

  return jax.jit(run)


def dequantise(
    codes: jax.Array,
    statistics: dict[str, jax.Array],
    form: plain.Format,
    dtype: Any = jnp.float32,
    *,
    below: jax.Array | None = None,
    backend: str | None = None,
    interpret: Any = False,
) -> jax.Array:
  """The weight `[..., i, o]` in `dtype`, the same bits by every backend.

  Args:
    codes: `[..., i / codes_per_byte, o]`.
    statistics: `[..., q, o]` by name.
    form: how they become numbers.
    dtype: of the result.
    below: `[..., n, o]` in `dtype`, more rows to put into the same buffer.
    backend: `"xla"` or a key of `KERNELS`; by default what `DEFAULTS` has for
      the platform, or plain XLA where that kernel does not apply.
    interpret: True to run a kernel without its device. (Not `mosaic_gpu`,
      whose interpreter has effects, which nothing here may have: call
      `mosaic_gpu.dequantise` by itself.)

  Returns:
    float32 arithmetic with one rounding to `dtype`; see `plain.dequantise`.
    `[..., i + n, o]` with `below`.

  Raises:
    errors.UsageError: if `backend` is unknown.
    errors.UserError: if `backend` names a kernel that does not apply.
  """
  codes = jnp.asarray(codes)
  # A transformation may have sorted the names.
  names = tuple(sorted(statistics, key=lambda name: (name != "scales", name)))
  call = _Call(
      form, names, jnp.dtype(dtype), interpret, below is not None)
  arrays = [statistics[name] for name in names]
  if below is not None:
    arrays.append(below)
  what = f"{list(codes.shape)} codes in blocks of {form.block_size}"
  platforms: tuple[tuple[str, str], ...] = ()
  if backend is None:
    fitting = [
        (platform, [name for name in names if call.applies(name, codes)])
        for platform, names in DEFAULTS.items()
        if not (platform == "cuda" and not_hopper())]
    platforms = tuple((platform, found[0]) for platform, found in fitting
                      if found)
    if len(platforms) < len(DEFAULTS):
      _log.debug("%s as %s: kernels on %s only", what, call.dtype,
                 [p for p, _ in platforms])
  else:
    errors.choose("backend", backend, {"xla": None, **KERNELS})
    if backend != "xla":
      platforms = ((_ANY, backend),)
    if platforms and not call.applies(backend, codes):
      raise errors.UserError(
          f'backend="{backend}" has no kernel for {what} as {call.dtype}; '
          'leave it out, or use "xla"')
  if not platforms:
    return call.plain(codes, *arrays)
  return _compiled(call, platforms)(codes, *arrays)
