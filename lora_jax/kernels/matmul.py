"""`x @ w` of few rows by a kernel that decodes `w` as it goes, or plainly.

A weight of 4 bits is a quarter of its bytes in 16, so that a product that only
waits for the weight, as in decoding, is that much faster if nothing writes the
decoded weight to memory. With more rows than `ROWS` the weight is dequantised
(`dequantise.py`) and multiplied.

As there, the platform that the program is compiled for decides, by `DEFAULTS`.
On Hopper the kernel takes 17, 27, 38 and 85 us at 4096x4096, 4096x11008,
14336x4096 and 8192x28672, one row, and 24, 32, 50 and 104 at 16 rows (H100
80GB HBM3, jax 0.11.2); to dequantise alone takes 18, 41, 52 and 205.
`python -m tests.kernels.matmul_gpu` checks and times it.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from typing import Any

import jax
from jax import custom_batching
import jax.numpy as jnp

from lora_jax import errors
from lora_jax.kernels import dequantise
from lora_jax.kernels import matmul_gpu
from lora_jax.kernels import matmul_tpu
from lora_jax.kernels import partition
from lora_jax.kernels import plain

_log = logging.getLogger(__name__)

KERNELS: dict[str, Any] = {
    "mosaic_tpu": matmul_tpu, "mosaic_gpu": matmul_gpu}
# Lowering platform -> the kernel it gets wherever that applies.
DEFAULTS: dict[str, str] = {"cuda": "mosaic_gpu"}
ROWS = 32  # What is more is a product of matrices.
_ANY = "any"


@dataclasses.dataclass(frozen=True)
class _Call:
  """What is static of a call: `names` of the statistics, in order.

  Four arrays may follow the statistics: the scales in 8 bits.
  """

  form: plain.Format
  names: tuple[str, ...]
  interpret: Any = False

  def plain(self, x: jax.Array, codes: jax.Array, *statistics: jax.Array
            ) -> jax.Array:
    named = dict(zip(self.names, statistics))
    return x @ dequantise.dequantise(codes, named, self.form, x.dtype)

  def applies(self, backend: str, x: jax.Array, codes: jax.Array) -> bool:
    """Whether the kernel `backend` takes arrays of these shapes."""
    form = self.form
    if form.levels is None or self.names not in (
        ("scales",), ("scales", "minimums")):
      return False
    in_features, columns = 2 * codes.shape[-2], codes.shape[-1]
    return KERNELS[backend].applies(
        x.shape[-2], in_features, columns,
        min(form.block_size, in_features), x.dtype)

  def kernel(self, backend: str, x: jax.Array, codes: jax.Array,
             *statistics: jax.Array) -> jax.Array:
    """`[..., m, o]` by a kernel, or plain where a shard does not fit it."""
    if not self.applies(backend, x, codes):
      return self.plain(x, codes, *statistics)
    flat = [a.reshape(-1, *a.shape[-2:])
            for a in (x, codes, *statistics[:len(self.names)])]
    more = {"interpret": self.interpret} if self.interpret else {}
    product = KERNELS[backend].matmul(
        *flat, levels=self.form.levels,
        block_size=min(self.form.block_size, 2 * codes.shape[-2]), **more)
    return product.reshape(*x.shape[:-1], codes.shape[-1])

  def nested(self, backend: str, x: jax.Array, codes: jax.Array,
             *statistics: jax.Array) -> jax.Array:
    """The same with the scales in 8 bits."""
    lead = x.ndim - 2
    scales, absmax, offset, table = statistics[len(self.names):]
    product = KERNELS[backend].matmul(
        *[a.reshape(-1, *a.shape[-2:]) for a in (x, codes, scales)],
        absmax.reshape(-1, absmax.shape[-1]), offset.reshape(-1),
        table[(0,) * lead], levels=self.form.levels,
        block_size=min(self.form.block_size, 2 * codes.shape[-2]))
    return product.reshape(*x.shape[:-1], codes.shape[-1])


@functools.cache
def _compiled(call: _Call, platforms: tuple[tuple[str, str], ...]) -> Any:
  """A function of `x [..., m, i]`, codes and statistics that takes the kernel
  of the platform it is compiled for; `_ANY` is every platform."""

  def placed(platform, backend, codes, count):
    run = functools.partial(call.kernel, backend)
    if platform == "tpu":
      return partition.local(run, call.plain)
    cut = partition.product(
        run, min(call.form.block_size, 2 * codes.shape[-2]))

    def shards(x, codes, *statistics):
      return cut(x, codes, *statistics[:len(call.names)])

    if backend != "mosaic_gpu" or count == len(call.names):
      return shards
    # What a scale of 8 bits stands for depends on where it is in the whole.
    return partition.local(functools.partial(call.nested, backend), shards)

  def choose(x, codes, *statistics):
    kernels = {
        platform: placed(platform, backend, codes, len(statistics))
        for platform, backend in platforms}
    if _ANY in kernels:
      return kernels[_ANY](x, codes, *statistics)
    return jax.lax.platform_dependent(
        x, codes, *statistics, default=call.plain, **kernels)

  # Kernels have no batching rule that keeps them one launch, nor derivatives.
  batched = custom_batching.custom_vmap(choose)

  @batched.def_vmap
  def _(size, is_batched, x, *weight):
    if is_batched[0] and not any(is_batched[1:]):  # They are more rows.
      lead, (rows, width) = x.shape[1:-2], x.shape[-2:]
      x = jnp.moveaxis(x, 0, -3).reshape(*lead, size * rows, width)
      y = (batched if x.shape[-2] <= ROWS else call.plain)(x, *weight)
      y = y.reshape(*lead, size, rows, y.shape[-1])
      return jnp.moveaxis(y, -3, 0), True
    return batched(*[
        a if b else jnp.broadcast_to(a, (size, *a.shape))
        for a, b in zip((x, *weight), is_batched, strict=True)]), True

  @jax.custom_jvp
  def run(x, codes, *statistics):
    return batched(x, codes, *statistics)

  @run.defjvp
  def _(primals, tangents):
    x, codes, *statistics = primals
    count = len(call.names)  # The scales in 8 bits are the same scales.
    _, tangent = jax.jvp(
        lambda x, *s: call.plain(x, codes, *s), (x, *statistics[:count]),
        (tangents[0], *tangents[2:2 + count]))
    return run(*primals), tangent

  return jax.jit(run)


def matmul(
    x: jax.Array,
    codes: jax.Array,
    statistics: dict[str, jax.Array],
    form: plain.Format,
    *,
    nested: tuple[jax.Array, ...] = (),
    backend: str | None = None,
    interpret: Any = False,
) -> jax.Array:
  """`x @ w` in `x`'s dtype, summed in float32.

  Args:
    x: `[..., i]`.
    codes: `[i / codes_per_byte, o]`.
    statistics: `[q, o]` by name.
    form: how they become numbers.
    nested: the statistic "scales", if it is the only one, in 8 bits as well:
      codes `[q, o]`, nested_absmax, offset and the map of `double.Nested`. A
      kernel may read these instead.
    backend: `"xla"` or a key of `KERNELS`; by default what `DEFAULTS` has for
      the platform, or plain XLA where that kernel does not apply.
    interpret: True to run the TPU kernel without a TPU.

  Returns:
    `[..., o]`. The plain path and the TPU kernel round weights to `x`'s dtype,
    the GPU kernel does not (see `matmul_gpu.matmul`).

  Raises:
    errors.UsageError: if `backend` is unknown.
    errors.UserError: if `backend` names a kernel that does not apply.
  """
  codes = jnp.asarray(codes)
  # A transformation may have sorted the names.
  names = tuple(sorted(statistics, key=lambda name: (name != "scales", name)))
  call = _Call(form, names, interpret)
  arrays = [*[statistics[name] for name in names], *map(jnp.asarray, nested)]
  rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
  what = (f"{list(rows.shape)} {x.dtype} by {list(codes.shape)} codes in "
          f"blocks of {form.block_size}")
  platforms: tuple[tuple[str, str], ...] = ()
  if backend is None:
    platforms = tuple(
        (platform, name) for platform, name in DEFAULTS.items()
        if call.applies(name, rows, codes)
        and not (platform == "cuda" and dequantise.not_hopper()))
    if len(platforms) < len(DEFAULTS) and len(rows) <= ROWS:
      _log.debug("%s: kernels on %s only", what, [p for p, _ in platforms])
  else:
    errors.choose("backend", backend, {"xla": None, **KERNELS})
    if backend != "xla":
      platforms = ((_ANY, backend),)
    if platforms and not call.applies(backend, rows, codes):
      raise errors.UserError(
          f'backend="{backend}" has no kernel for {what}; leave it out, or '
          'use "xla"')
  if not platforms:
    return call.plain(x, codes, *arrays)
  y = _compiled(call, platforms)(rows, codes, *arrays)
  return y.reshape(*x.shape[:-1], y.shape[-1])
