"""The frame shared by all formats: blocks along `i`, and packing.

A weight `[i, o]` is cut along `i` into blocks of `block_size` rows; each
column of a block is quantised by itself. Where `block_size` does not divide
`i`, the last block is a short tail. Two 4-bit codes share a byte: byte row `r`
of a block of `n` rows holds row `r` in its low nibble and row `r + n / 2` in
its high one, so that a tile of bytes and a row of scales make whole blocks,
and a layer can be sharded along either axis.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec

from lora_jax import errors
from lora_jax import mesh as mesh_lib
from lora_jax import struct
from lora_jax import types
from lora_jax.kernels import decode as decode_lib
from lora_jax.kernels import dequantise
from lora_jax.kernels import matmul
from lora_jax.kernels import packing
from lora_jax.kernels import plain
from lora_jax.quant import double
from lora_jax.quant import dynamic

# A block size that no weight exceeds: every column is one block.
WHOLE = 2**30


@dataclasses.dataclass(frozen=True)
class QuantSpec:
  """How to quantise a weight.

  Attributes:
    format: a key of `registry.FORMATS`, or `"none"`.
    block_size: rows of a block, an even number.
    double: whether the statistics of the blocks are quantised to 8 bits too.
  """

  format: str = "nf4"
  block_size: int = 64
  double: bool = True

  def __post_init__(self):
    size = self.block_size
    if not isinstance(size, int) or size < 2 or size % 2:
      raise errors.UserError(
          f"quant.block_size={size!r} is not an even number of 2 or more; "
          "use 64 (or 32, 128, 256)")


class Computed:
  """A weight `[i, o]` that is made of another where it is used.

  Everything that it is made of may have gradients; see `adapters.several`.
  """

  @property
  def shape(self) -> tuple[int, ...]:
    raise TypeError(f"{type(self).__name__} has no shape")

  @property
  def ndim(self) -> int:
    return len(self.shape)

  def matmul(self, x: jax.Array) -> jax.Array:
    """`x [..., i] @ w` in `x`'s dtype -> `[..., o]`."""
    raise TypeError(f"{type(self).__name__} has no product")

  def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
    """The weight itself, `[i, o]`."""
    raise TypeError(f"{type(self).__name__} is no matrix")

  def take(self, rows: types.Array) -> jax.Array:
    """Rows `[..., o]` of it, for `rows [...]`."""
    raise TypeError(f"{type(self).__name__} is no table")


@struct.dataclass(kw_only=True)
class QuantizedArray:
  """A weight `[i, o]` stored in few bits; a format is a subclass.

  No shape is kept beside the arrays: inside a scan they lose their leading
  axis, and static metadata would lie. All arrays may carry leading axes, as in
  `[l, i, o]`.

  A format gives `encode` and `decode`, and `levels` if a kernel may decode it;
  it may override `matmul` and `matmul_transposed` with a kernel.

  Attributes:
    codes: uint8 `[i / 2, o]` with two codes a byte, or int8 `[i, o]`.
    scales: float32 `[q, o]`, or the same nested.
    block_size: rows of a block.
    home: mesh and spec by which codes, statistics and weight are cut alike,
      where XLA cannot cut a kernel by itself; set where a layer is used.
  """

  CODES_PER_BYTE: ClassVar[int] = 2

  codes: types.Array = mesh_lib.axes("in", "out")
  scales: double.Statistic = mesh_lib.axes("in", "out")
  block_size: int = struct.field(pytree_node=False, default=64)
  home: tuple[Mesh, PartitionSpec] | None = struct.field(
      pytree_node=False, default=None)

  @classmethod
  def encode(cls, w: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Codes `[n, size, o]` and statistics `[n, o]` by field name of float32
    blocks `[n, size, o]`."""
    raise TypeError(f"{cls.__name__} is the protocol, not a format")

  @classmethod
  def decode(
      cls, codes: jax.Array, statistics: dict[str, jax.Array]
  ) -> jax.Array:
    """float32 `[n, size, o]` of codes and statistics `[n, 1, o]`."""
    raise TypeError(f"{cls.__name__} is the protocol, not a format")

  @classmethod
  def levels(cls) -> decode_lib.Levels | None:
    """`decode` for kernels: by code, what the scale is multiplied by."""
    return None

  @classmethod
  def quantize(cls, w: jax.Array, spec: QuantSpec) -> Self:
    """Quantises `w` `[i, o]` of any float dtype.

    Raises:
      errors.UserError: if two codes share a byte and `i` is odd.
    """
    rows, out = w.shape
    if rows % cls.CODES_PER_BYTE:
      raise errors.UserError(
          f"in_features={rows} of a weight {list(w.shape)} is odd, and "
          f'quant.format="{spec.format}" packs two rows a byte; use "int8" or '
          "leave this weight out")
    codes, statistics = [], []
    for span in packing.spans(rows, spec.block_size):
      block = w[span.row : span.row + span.number * span.size]
      block = block.reshape(span.number, span.size, out).astype(jnp.float32)
      block = jnp.where(jnp.isfinite(block), block, jnp.nan)
      code, statistic = cls.encode(block)
      codes.append(packing.pack(code) if cls.CODES_PER_BYTE == 2
                   else code.reshape(-1, out))
      statistics.append(statistic)
    joined = jax.tree.map(lambda *parts: jnp.concatenate(parts), *statistics)
    stored: dict[str, Any] = {name: double.nest(x) if spec.double else x
              for name, x in joined.items()}
    return cls(
        codes=jnp.concatenate(codes), block_size=spec.block_size, **stored)

  def statistics(self) -> dict[str, jax.Array]:
    """What `decode` takes: float32 `[q, o]` by field name."""
    return {"scales": double.unnest(self.scales)}

  @property
  def shape(self) -> tuple[int, ...]:
    """`(i, o)`, after the leading axes if there are any."""
    *lead, rows, out = self.codes.shape
    return (*lead, rows * self.CODES_PER_BYTE, out)

  @property
  def ndim(self) -> int:
    return self.codes.ndim

  @property
  def in_features(self) -> int:
    return self.shape[-2]

  @property
  def out_features(self) -> int:
    return self.shape[-1]

  def columns(self, start: int, stop: int) -> Self:
    """`w[:, start:stop]`, the same values; what is nested is unnested."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(self):
      if field.metadata.get("axes", ())[-1:] == ("out",):
        value = double.unnest(getattr(self, field.name))
        found[field.name] = value[..., start:stop]
    return dataclasses.replace(self, **found)

  @property
  def extensible(self) -> bool:
    """Whether `dequantize` knows how to put more rows below."""
    return self.home is None

  def unnested(self) -> Self:
    """The same values; what is nested has been unnested, for whoever uses a
    weight often: float32 statistics in blocks of 64 are 0.5 bits a value."""
    return dataclasses.replace(self, **{
        field.name: double.unnested(value)
        for field in dataclasses.fields(self)
        if isinstance(value := getattr(self, field.name), double.Nested)})

  def dequantize(
      self, dtype: Any = jnp.float32, below: types.Array | None = None
  ) -> jax.Array:
    """The weight `[i, o]`, after the leading axes if there are any.

    Computed in float32 and rounded once to `dtype`; equal to numpy's
    multiply-then-add bit for bit, inside jit and scan as well.

    Args:
      dtype: of the result.
      below: `[n, o]` in `dtype`, more rows to put into the same buffer, of a
        weight that is `extensible`.

    Returns:
      `[i, o]`, or `[i + n, o]`.
    """
    if self.ndim > 2:
      return jax.vmap(lambda w: w.dequantize(dtype))(self)
    run = functools.partial(
        dequantise.dequantise, dtype=dtype, form=self._form())
    if self.home is not None:
      mesh, spec = self.home
      # Kernels say nothing about which axes their results vary over.
      run = jax.shard_map(
          run, mesh=mesh, in_specs=(spec, spec), out_specs=spec,
          check_vma=False)
      return run(self.codes, self.statistics())
    return run(self.codes, self.statistics(), below=below)

  def after(self, g: Any) -> tuple[Self, Any]:
    """The same weight, which is not there before g is; and g.

    Lest XLA merge its dequantisation with one before, and keep every weight
    of a layer in between. (A compiler that strips barriers, as on CPU in jax
    0.10, merges them.) The smallest array is enough: a kernel can read a
    layer's out of their stack as long as nothing stands between.
    """
    leaves, structure = jax.tree.flatten(self)
    least = min(range(len(leaves)), key=lambda n: leaves[n].size)
    leaves[least], g = jax.lax.optimization_barrier((leaves[least], g))
    return jax.tree.unflatten(structure, leaves), g

  def _form(self) -> plain.Format:
    return plain.Format(
        self.decode, self.block_size, self.CODES_PER_BYTE, self.levels())

  def matmul(self, x: jax.Array) -> jax.Array:
    """`x [..., i] @ w` in `x`'s dtype -> `[..., o]`."""
    if self.ndim == 2 and self.levels() is not None and self.home is None:
      statistics = self.statistics()
      nested: tuple[Any, ...] = ()
      if isinstance(self.scales, double.Nested) and len(statistics) == 1:
        s = self.scales
        nested = (s.codes, s.nested_absmax, s.offset, dynamic.table())
      return matmul.matmul(
          x, self.codes, statistics, self._form(), nested=nested)
    return x @ self.dequantize(x.dtype)

  def matmul_transposed(self, g: jax.Array) -> jax.Array:
    """`g [..., o] @ w.T` in `g`'s dtype -> `[..., i]`."""
    return g @ self.dequantize(g.dtype).T
