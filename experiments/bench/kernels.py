"""Rates of single kernels: bytes of device memory a second.

Every call goes over so many copies of the weight that no cache holds them.
A kernel is a row of `KERNELS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench import lines
from experiments.bench import settings as settings_lib
from experiments.bench import timing
from lora_jax import quant
from lora_jax import trees

# Of the weights in one call; more would only take memory.
MOST_COPIES = 64


@dataclasses.dataclass(frozen=True)
class Kernel:
  """A row of the table.

  Attributes:
    cases: config of the `kernels` block -> what distinguishes the calls.
    operands: (key, weights `[l, i, o]`, dtype, case) -> what a call reads.
    call: (dtype, *operands) -> what it writes; compiled here.
    written: (l, i, o, dtype, case) -> bytes that a call writes.
  """

  cases: Callable[[Mapping[str, Any]], Iterator[lines.Line]]
  operands: Callable[..., tuple[Any, ...]]
  call: Callable[..., Any]
  written: Callable[..., int]


def _one_case(block) -> Iterator[lines.Line]:
  del block
  yield {}


def _rows(block) -> Iterator[lines.Line]:
  for m in settings_lib.numbers("kernels.rows", block["rows"]):
    yield {"rows": m}


def _products(dtype, x, weights):
  """`x [m, i]` times every weight, as decoding goes over the layers."""
  del dtype  # It is x's.
  return jax.lax.map(lambda w: quant.matmul(x, w), weights)


KERNELS: dict[str, Kernel] = {
    "dequantise": Kernel(
        cases=_one_case,
        operands=lambda key, weights, dtype, case: (weights,),
        call=lambda dtype, weights: weights.dequantize(dtype),
        written=lambda l, i, o, dtype, case: l * i * o * dtype.itemsize),
    "matmul": Kernel(
        cases=_rows,
        operands=lambda key, weights, dtype, case: (
            jax.random.normal(key, (case["rows"], weights.shape[-2]), dtype),
            weights),
        call=_products,
        written=lambda l, i, o, dtype, case: (
            l * case["rows"] * o * dtype.itemsize)),
}


def copies(span: int, each: int) -> int:
  """How many weights of `each` bytes make `span` bytes, at least one."""
  return min(max(-(-span // each), 1), MOST_COPIES)


def abstract(
    spec: quant.QuantSpec, shape: tuple[int, int], number: int = 1
) -> quant.QuantizedArray:
  """Shapes and types of `number` weights of a shape, `[l, i, o]`."""
  return jax.eval_shape(lambda: quant.quantize(
      jnp.zeros((number, *shape), jnp.bfloat16), spec))


def random(
    key: jax.Array, like: quant.QuantizedArray) -> quant.QuantizedArray:
  """Random codes and statistics: made faster than weights are quantised."""
  leaves, structure = jax.tree.flatten(like)

  def one(key, x):
    if jnp.issubdtype(x.dtype, jnp.integer):  # int8 or uint8
      bits = jax.random.bits(key, x.shape, jnp.uint8)
      return jax.lax.bitcast_convert_type(bits, x.dtype)
    return jax.random.uniform(key, x.shape, x.dtype, 1e-3, 1e-2)

  keys = jax.random.split(key, len(leaves))
  return jax.tree.unflatten(structure, map(one, keys, leaves))


def measure(
    kernel: Kernel, spec: quant.QuantSpec, shape: tuple[int, int],
    case: lines.Line, dtype: Any, span: int) -> lines.Line:
  """Seconds of a call, and bytes read and written a second."""
  key = jax.random.key(sum(shape))
  each = trees.nbytes(abstract(spec, shape)) + kernel.written(
      1, *shape, dtype, case)
  number = copies(span, each)
  weights = random(key, abstract(spec, shape, number))
  operands = kernel.operands(key, weights, dtype, case)
  run = jax.jit(functools.partial(kernel.call, dtype))
  times = timing.repeated(lambda: run(*operands))
  read = trees.nbytes(operands)
  total = read + kernel.written(number, *shape, dtype, case)
  return times.row("call_s") | {
      "copies": number, "packed_bytes": trees.nbytes(weights),
      "read_bytes": read, "written_bytes": total - read,
      "gb_per_s": total / times.median / 1e9}


def run(config: Mapping[str, Any], emit: lines.Emit) -> None:
  """Emits a line for each kernel, format, shape and case."""
  block, quantised = config["kernels"], config["quant"]
  dtype = jnp.dtype(config["compute"]["dtype"])
  shapes = settings_lib.shapes("kernels.shapes", block["shapes"])
  formats = settings_lib.choices(
      "kernels.formats", block["formats"], quant.FORMATS)
  for name, kernel in KERNELS.items():
    for form in formats:
      spec = quant.QuantSpec(
          form, quantised["block_size"], quantised["double"])
      for shape in shapes:
        for case in kernel.cases(block):
          about = {"part": "kernels", "name": name, "format": form,
                   "double": spec.double, "block_size": spec.block_size,
                   "shape": list(shape), "dtype": dtype.name, **case}
          lines.attempt(emit, about, functools.partial(
              measure, kernel, spec, shape, case, dtype, block["span_bytes"]))
