"""Every variant of the dequantisation kernels on a GPU: bits, then rates.

    python -m tests.kernels.dequantise_gpu [seconds, 80 by default]

First all variants and formats against plain XLA at a small shape. Then, shape
by shape, each variant's bits once more and its rate: bytes read and written a
second, of calls over a stack of layers of half a gigabyte together. A time is
the difference between many calls and few, so that neither the first launch nor
the last wait counts. Lines are flushed; what fails says so, and the rest goes
on. Not collected by pytest, whose machines have no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.kernels import dequantise
from lora_jax.kernels import direct_gpu
from lora_jax.kernels import mosaic_gpu
from lora_jax.kernels import plain
from lora_jax.quant import double
from lora_jax.quant import dynamic
from tests.kernels import gpu_check

SHAPES = [(4096, 4096), (4096, 11008), (14336, 4096), (8192, 28672)]
SMALL = (1024, 1376)  # No power of two.
BLOCK, BYTES = 64, 2**29
FEW, MANY, REPEATS = 3, 15, 5
_START = time.perf_counter()

Variant = direct_gpu.Variant
# Likely ones first: time may run out. The best follow at the end.
DIRECT = {
    "direct": Variant(),
    "direct r16": Variant(rows=16),
    "direct r4": Variant(rows=4),
    "direct c4 r16": Variant(columns=4, rows=16),
    "direct c16 r4": Variant(columns=16, rows=4),
    "direct r32 ahead 8": Variant(rows=32, ahead=8),
    "direct st.cs": Variant(store=".cs"),
    "direct ld L2::256B": Variant(load=".L1::no_allocate.L2::256B"),
    "direct 2 warpgroups": Variant(warpgroups=2),
    "direct steps 2": Variant(steps=2),
    "direct persistent": Variant(steps=0),
    "direct persistent r4": Variant(steps=0, rows=4),
    "direct select": Variant(decode="select"),
}
MOSAIC = {
    "mosaic (now)": mosaic_gpu.Variant(),
    "mosaic shuffle": mosaic_gpu.Variant(lookup="shuffle"),
    "mosaic shuffle r16": mosaic_gpu.Variant(rows=16, lookup="shuffle"),
    "mosaic shuffle r8": mosaic_gpu.Variant(rows=8, lookup="shuffle"),
}


def form(name: str) -> plain.Format:
  cls = gpu_check.FORMATS[name]
  return plain.Format(cls.decode, BLOCK, 2, cls.levels())


def nested(key: jax.Array, layers: int, rows: int, columns: int) -> Any:
  """Random 8-bit statistics `[l, q, o]` of a stack."""
  q = rows // BLOCK
  keys = jax.random.split(key)
  return double.Nested(
      jax.random.bits(keys[0], (layers, q, columns), jnp.uint8),
      jax.random.uniform(keys[1], (layers, -(-q * columns // double.BLOCK))),
      jnp.full(layers, 0.7))


def kernel(module: Any, name: str, variant: Any) -> Callable[..., jax.Array]:
  def run(codes, named):
    # Inside jit the names are sorted.
    given = [named[k] for k in ("scales", "minimums") if k in named]
    return module.dequantise(
        codes, *given, levels=form(name).levels, block_size=BLOCK,
        dtype=jnp.bfloat16, variant=variant)

  return jax.jit(run)


def oracle(name: str) -> Callable[..., jax.Array]:
  return jax.jit(functools.partial(
      dequantise.dequantise, form=form(name), dtype=jnp.bfloat16,
      backend="xla"))


def variants(name: str) -> dict[str, Callable[..., jax.Array]]:
  return {
      **{k: kernel(direct_gpu, name, v) for k, v in DIRECT.items()},
      **({"direct arithmetic": kernel(
          direct_gpu, name, Variant(decode="arithmetic"))}
         if name.startswith("int4") else {}),
      **{k: kernel(mosaic_gpu, name, v) for k, v in MOSAIC.items()}}


def doubly(inside: bool, variant: Variant) -> Callable[..., jax.Array]:
  """NF4 under 8-bit scales, unnested in the kernel or by XLA before it."""

  def run(codes, scales):
    if not inside:
      whole = jax.vmap(lambda s: s.dequantize())(scales)
      return kernel(direct_gpu, "nf4", variant)(codes, {"scales": whole})
    given = scales.codes, scales.nested_absmax, scales.offset
    return direct_gpu.dequantise(
        codes, given, levels=form("nf4").levels, block_size=BLOCK,
        dtype=jnp.bfloat16, table=jnp.asarray(dynamic.table()),
        variant=variant)

  return jax.jit(run)


@jax.jit
def differing(a: jax.Array, b: jax.Array) -> jax.Array:
  """How many values differ in a bit, NaNs aside."""
  x, y = (jax.lax.bitcast_convert_type(v, jnp.uint16) for v in (a, b))
  return jnp.sum((x != y) & ~(jnp.isnan(a) & jnp.isnan(b)))


def seconds(run: Callable[..., Any], *args: Any) -> float:
  """Of one call, when many wait in a row."""

  def calls(n):
    start = time.perf_counter()
    out = None
    for _ in range(n):
      out = run(*args)
    jax.block_until_ready(out)
    return time.perf_counter() - start

  calls(2)
  return statistics.median(
      (calls(MANY) - calls(FEW)) / (MANY - FEW) for _ in range(REPEATS))


def say(label: str, text: str) -> None:
  spent = time.perf_counter() - _START
  print(f"{label:28s} {text}  [{spent:.0f} s]", flush=True)


def attempt(label: str, make: Callable[[], Any]) -> Any:
  """What `make` returns, or None after a line that says what went wrong."""
  try:
    return make()
  except Exception as error:  # Say so, and go on.
    line = (str(error).strip() or repr(error)).splitlines()[0][:160]
    say(label, f"FAILED {type(error).__name__}: {line}")
  return None


def check_small() -> None:
  print("values that differ from XLA's, of a small weight")
  for name in gpu_check.FORMATS:
    codes, named = gpu_check.stored(name, 2, *SMALL)
    want = oracle(name)(codes, named)
    runs = variants(name)
    if name in ("fp4", "int4_affine"):
      runs = {k: v for k, v in runs.items() if k in (
          "direct", "direct arithmetic", "mosaic shuffle")}


    def wrong_of(run, args=(codes, named), want=want):
      return int(differing(run(*args), want))

    found = {k: attempt(f"{name} {k}", functools.partial(wrong_of, run))
             for k, run in runs.items()}
    wrong = {k: v for k, v in found.items() if v != 0}
    say(name, f"{len(found)} variants, wrong: {wrong or 'none'}")


def ceilings() -> float:
  """Rates of a copy, and of reading one part and writing four; the first."""
  words = BYTES // 8
  x = jnp.arange(words, dtype=jnp.uint32)
  rate = 8 * words / seconds(jax.jit(lambda x: x ^ 1), x) / 1e9
  say("device copy", f"{rate:.0f} GB/s")
  x = x[: BYTES // 20]
  spread = jax.jit(lambda x: x[:, None] ^ jnp.arange(4, dtype=jnp.uint32))
  say("read 1, write 4", f"{20 * len(x) / seconds(spread, x) / 1e9:.0f} GB/s")
  return rate


def time_shape(rows: int, columns: int, copy: float, limit: float) -> None:
  """Rates at one shape, the best last."""
  each = rows * columns * (2.5 + 4 / BLOCK)
  layers = max(1, round(BYTES / each))
  print(f"\n{layers} x {rows} x {columns}, GB/s and share of a copy")
  codes, named = gpu_check.stored("nf4", layers, rows, columns)
  scales = nested(jax.random.key(1), layers, rows, columns)
  want = attempt("xla", lambda: oracle("nf4")(codes, named))
  rates: dict[str, float] = {}

  def measure(label, run, args, expected, total):
    if time.perf_counter() - _START > limit:
      return
    wrong = attempt(label, lambda: int(differing(run(*args), expected)))
    if wrong is None:
      return
    rate = attempt(label, lambda: total / seconds(run, *args) / 1e9)
    if rate is None:
      return
    note = f"  {wrong} VALUES DIFFER" if wrong else ""
    rates[label + note] = rate
    say(label, f"{rate:5.0f}  {rate / copy:4.0%}{note}")

  total = layers * each
  less = total - 3 / BLOCK * layers * rows * columns
  whole = jax.jit(jax.vmap(double.Nested.dequantize))(scales)
  unnested = attempt("nested", lambda: oracle("nf4")(codes, {"scales": whole}))
  mine = variants("nf4")

  def measure_nf4(*labels):
    for label in labels:
      measure(label, mine.pop(label), (codes, named), want, total)

  def measure_nested(label, inside, variant):
    measure(label, doubly(inside, variant), (codes, scales), unnested, less)

  measure("xla", oracle("nf4"), (codes, named), want, total)
  measure_nf4("direct", "mosaic (now)", "mosaic shuffle")
  measure_nested("nested inside", True, Variant())
  measure_nested("nested, XLA before", False, Variant())
  measure_nf4("direct r16", "direct r4", "direct st.cs", "direct persistent")
  others, fours = gpu_check.stored("int4", layers, rows, columns)
  expected = attempt("int4", lambda: oracle("int4")(others, fours))
  for label in ("direct arithmetic", "mosaic (now)"):
    measure(f"int4 {label}", variants("int4")[label], (others, fours),
            expected, total)
  measure_nf4(*mine)
  measure_nested("nested inside r16", True, Variant(rows=16))
  measure_nested("nested inside r32", True, Variant(rows=32, ahead=8))
  for label, rate in sorted(rates.items(), key=lambda item: item[1])[-4:]:
    print(f"  {label:28s} {rate:5.0f}  {rate / copy:4.0%}", flush=True)


def time_layers(rows: int, columns: int, limit: float) -> None:
  """One weight a call, as a model's layers are: cut out of the stack by XLA or
  read where it lies."""
  layers = 4
  print(f"\nmicroseconds a weight {rows} x {columns}, one call each")
  codes, named = gpu_check.stored("nf4", layers, rows, columns)
  scales = nested(jax.random.key(1), layers, rows, columns)
  levels = form("nf4").levels

  def cut(layer, tree):
    return jax.tree.map(
        lambda x: jax.lax.dynamic_slice_in_dim(x, layer, 1), tree)

  def direct(codes, *given, **how):
    return direct_gpu.dequantise(
        codes, *given, levels=levels, block_size=BLOCK, dtype=jnp.bfloat16,
        **how)

  def within(scales):
    return scales.codes, scales.nested_absmax, scales.offset

  def outside(layer, codes, scales):
    whole = jax.vmap(double.Nested.dequantize)(cut(layer, scales))
    return direct(cut(layer, codes), whole)

  def mosaic(layer, codes, named):
    return kernel(mosaic_gpu, "nf4", mosaic_gpu.DEFAULT)(
        *cut(layer, (codes, named)))

  def placed(variant, layer, codes, named):
    return direct(codes, named["scales"], layer=layer, variant=variant)

  plainly = [
      ("xla, cut", lambda n, c, s: oracle("nf4")(*cut(n, (c, s)))),
      ("direct, cut", lambda n, c, s: direct(*cut(n, (c, s["scales"])))),
      *[(f"{label}, placed", functools.partial(placed, DIRECT[label]))
        for label in ("direct", "direct r4", "direct r16")]]
  doubly_ = [
      ("nested, XLA before, cut", outside),
      ("nested inside, placed", lambda n, c, s: direct(
          c, within(s), layer=n, table=jnp.asarray(dynamic.table())))]
  rows_ = [*[(*row, named) for row in plainly],
           *[(*row, scales) for row in doubly_],
           ("mosaic (now), cut", mosaic, named)]  # Compiles longest.
  for label, take, given in rows_:
    if time.perf_counter() - _START > limit:
      return
    # Numbers are arguments, lest XLA cut by constants.
    run = jax.jit(lambda order, codes, given, take=take: [
        take(order[k], codes, given) for k in range(layers)])
    spent = attempt(label, functools.partial(
        seconds, run, jnp.arange(layers), codes, given))
    if spent is not None:
      say(label, f"{spent / layers * 1e6:.1f}")


def main() -> None:
  limit = float(sys.argv[1]) if len(sys.argv) > 1 else 80.0
  print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}", flush=True)
  attempt("small", check_small)
  copy = attempt("copy", ceilings) or 2870.0
  for n, shape in enumerate(SHAPES):
    # A later shape's share of the time is not spent by the first.
    spent = time.perf_counter() - _START
    attempt(str(shape), functools.partial(
        time_shape, *shape, copy,
        spent + (limit - spent) / (len(SHAPES) - n)))
  for shape in SHAPES[:2]:
    attempt("layers", functools.partial(time_layers, *shape, limit + 20))


if __name__ == "__main__":
  main()
