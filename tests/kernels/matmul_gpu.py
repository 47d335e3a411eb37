"""Few rows times a 4-bit weight on a GPU: right, and how fast by which plan.

    python -m tests.kernels.matmul_gpu [seconds]

First every way of the kernel against dequantise-then-dot in float32, then a
table of plans, shapes and rows, and the best of each last. What fails prints a
line, and the rest goes on; after `seconds` (110) nothing new begins. Not
collected by pytest, whose machines have no GPU.

A time is that of one call among many in one program, over weights of 0.5 GB,
so that none is in the cache. GB/s count the packed codes alone; the share is of
a copy's bytes, read and written, in the same run.
"""

from __future__ import annotations

from concurrent import futures
import functools
import math
import statistics
import sys
import time

import jax
import jax.numpy as jnp

from lora_jax import quant
from lora_jax.kernels import dequantise
from lora_jax.kernels import matmul_gpu
from lora_jax.kernels import plain
from lora_jax.quant import double
from lora_jax.quant import dynamic

Plan = matmul_gpu.Plan
START = time.perf_counter()
BLOCK = 64
BYTES = 2**29
SHAPES = [(4096, 4096), (4096, 11008), (14336, 4096), (8192, 28672)]
ROWS = [1, 4, 16, 32]
# GB/s of packed bytes that bitsandbytes 0.50.2 reads on an H100, one row.
PEER = dict(zip(SHAPES, (777, 947, 1018, 1073), strict=True))
NARROW = [Plan(8, 4), Plan(8, 8), Plan(8, 2), Plan(8, 4, terms=1)]
WIDE = [
    Plan(16, 4), Plan(16, 8), Plan(16, 2), Plan(16, 1), Plan(8, 4), Plan(8, 2),
    Plan(16, 4, terms=1), Plan(16, 4, decode="prmt"), Plan(16, 4, ahead=2),
    Plan(8, 4, ahead=2), Plan(16, 4, cluster=False)]
# By rows; None is `plan_for`'s.
PLANS = {1: [None, *WIDE], 4: [None, Plan(16, 4), Plan(8, 4)],
         16: [None, *NARROW, Plan(16, 4)], 32: [None, *NARROW, Plan(4, 4)]}
NESTED = "nf4, nested"  # With scales of 8 bits.
CHECKS = [
    ("nf4", jnp.bfloat16, 1, Plan(16, 4)),
    ("nf4", jnp.bfloat16, 9, Plan(8, 8)),
    ("nf4", jnp.bfloat16, 32, Plan(8, 1)),
    ("nf4", jnp.float16, 4, Plan(16, 2, ahead=2)),
    ("nf4", jnp.bfloat16, 17, Plan(4, 4, terms=1)),
    ("nf4", jnp.bfloat16, 2, Plan(16, 2, decode="prmt")),
    ("fp4", jnp.bfloat16, 1, Plan(8, 2, decode="prmt")),
    ("fp4", jnp.bfloat16, 16, Plan(8, 4)),
    ("int4", jnp.bfloat16, 8, Plan(16, 3, cluster=False)),
    ("int4_affine", jnp.bfloat16, 5, Plan(8, 4)),
    ("nf4", jnp.bfloat16, 1, None),
    ("int4_affine", jnp.float16, 32, None),
    (NESTED, jnp.bfloat16, 3, Plan(8, 2)),
    (NESTED, jnp.bfloat16, 1, None),
]


def left(limit: float) -> bool:
  return time.perf_counter() - START < limit


def attempt(label: str, make) -> object:
  """`make()`, or None and a line that says why not."""
  try:
    return make()
  except Exception as error:  # Say so, and go on.
    line = (str(error).strip() or repr(error)).splitlines()[0][:200]
    print(f"{label}: FAILED {type(error).__name__}: {line}", flush=True)
    return None


def describe(plan: Plan | None) -> str:
  if plan is None:
    return "default"
  return (f"width {plan.width:2d}, {plan.splits} splits"
          f"{'' if plan.cluster else ' apart'}, {plan.decode} of "
          f"{1 if plan.decode == 'prmt' else plan.terms}, {plan.ahead} ahead")


def draw(name: str, number: int, ins: int, columns: int):
  """Random codes and statistics `[1, ...]`, `number` of each; of `NESTED`,
  the scales, and then the same in 8 bits."""
  found = []
  for n in range(number):
    keys = jax.random.split(jax.random.key(n), 4)
    codes = jax.random.bits(keys[0], (1, ins // 2, columns), jnp.uint8)
    named = [jax.random.uniform(keys[1], (1, ins // BLOCK, columns),
                                minval=1e-3, maxval=0.1)]
    if name == "int4_affine":
      named.append(-8 * named[0])
    if name == NESTED:
      blocks = (ins // BLOCK, columns)
      inner = double.Nested(
          jax.random.bits(keys[2], blocks, jnp.uint8),
          jax.random.uniform(keys[3], (-(-math.prod(blocks) // 256),)),
          jnp.float32(1.5))
      named = [inner.dequantize()[None], inner.codes[None],
               inner.nested_absmax[None], inner.offset[None],
               jnp.asarray(dynamic.table())]
    found.append((codes, *named))
  return found


@functools.lru_cache
def kernel(name: str, plan: Plan | None):
  """A function of `x`, codes and what `draw` has."""
  cls = quant.FORMATS[name.partition(",")[0]]

  @jax.jit
  def run(x, codes, *statistics):
    if len(statistics) > 2:
      statistics = statistics[1:] if name == NESTED else statistics[:1]
    return matmul_gpu.matmul(
        x, codes, *statistics, levels=cls.levels(), block_size=BLOCK,
        plan=plan)

  return run


def check(name, dtype, rows, plan) -> str:
  """The largest error as a share of what roundings may cost."""
  # Ragged chunks and columns, but for the default.
  ins, columns = (1088, 1040) if plan else SHAPES[0]
  codes, *named = draw(name, 1, ins, columns)[0]
  x = jax.random.normal(jax.random.key(7), (1, rows, ins)).astype(dtype)
  form = name.partition(",")[0]
  body = matmul_gpu.body_for(
      rows, ins, columns, BLOCK, dtype, quant.FORMATS[form].levels(), False,
      plan)
  got, again = (kernel(name, plan)(x, codes, *named) for _ in range(2))
  digits = 2.0**-8 if dtype == jnp.bfloat16 else 2.0**-11
  level = digits**len(body.terms) if form == "nf4" else 2.0**-22
  # The reference adds in float32 as well.
  share, same = _compared(
      x[0], codes[0], tuple(s[0] for s in named[:2 if len(named) == 2 else 1]),
      got[0], again[0], form,
      level + (ins + 64) * 2.0**-22, digits)
  if not share <= 1:  # NaN too.
    return f"WRONG: {share:.3g} of the bound"
  return f"right, {share:.2f} of the bound" if same else "NOT THE SAME TWICE"


@functools.partial(jax.jit, static_argnames="name")
def _compared(x, codes, named, got, again, name, relative, digits):
  cls = quant.FORMATS[name]
  w = dequantise.dequantise(
      codes, dict(zip(("scales", "minimums"), named)),
      plain.Format(cls.decode, BLOCK, 2, cls.levels()), jnp.float32,
      backend="xla")
  dot = functools.partial(jnp.dot, precision="highest")
  wide = x.astype(jnp.float32)
  want, size = dot(wide, w), dot(jnp.abs(wide), jnp.abs(w))
  error = jnp.abs(got.astype(jnp.float32) - want)
  return (error / (size * relative + jnp.abs(want) * digits)).max(), (
      got == again).all()


def seconds(run, *args) -> float:
  """Median time of a call, of which several follow each other."""
  jax.block_until_ready(run(*args))
  times = []
  for _ in range(5):
    start = time.perf_counter()
    outs = [run(*args) for _ in range(4)]
    jax.block_until_ready(outs)
    times.append((time.perf_counter() - start) / 4)
  return statistics.median(times)


def many(one):
  """One program that applies `one` to each weight."""
  return jax.jit(lambda x, weights: [one(x, *w) for w in weights])


@jax.jit
def plainly(x, codes, scales, *_):
  cls = quant.FORMATS["nf4"]
  form = plain.Format(cls.decode, BLOCK, 2, cls.levels())
  w = dequantise.dequantise(codes[0], {"scales": scales[0]}, form, x.dtype)
  return (x[0] @ w)[None]


def table(shape, pool, copy, limit, best) -> None:
  """Prints a shape's lines; the best go to `best`, by shape and rows."""
  ins, columns = shape
  packed = ins * columns // 2
  weights = draw(NESTED, -(-BYTES // packed), ins, columns)
  programs = []
  for rows in ROWS:
    x = jax.random.normal(
        jax.random.key(rows), (1, rows, ins)).astype(jnp.bfloat16)
    ways = {describe(plan): kernel("nf4", plan) for plan in PLANS[rows]}
    ways["default, nested"] = kernel(NESTED, None)
    if rows in (1, 16):
      ways["dequantise, then dot"] = plainly
    for way, one in ways.items():
      label = f"{ins}x{columns}, {rows:2d} rows, {way}"
      lowered = attempt(label, functools.partial(many(one).lower, x, weights))
      if lowered is not None:
        programs.append((label, rows, way, x, pool.submit(lowered.compile)))

  def each(program, x):
    return seconds(program.result(), x, weights) / len(weights)

  for label, rows, way, x, program in programs:
    if not left(limit + 5):
      program.cancel()
      continue
    took = attempt(label, functools.partial(each, program, x))
    if took is not None:
      rate = packed / took
      print(f"{label:70s} {took * 1e6:8.1f} us {rate / 1e9:6.0f} GB/s "
            f"{rate / copy:4.0%}", flush=True)
      best[shape, rows] = min(
          best.get((shape, rows), (took, way)), (took, way))


def main() -> None:
  limit = float(sys.argv[1]) if len(sys.argv) > 1 else 110.0
  print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
  big = jnp.zeros(2**28, jnp.float32)
  copy = 2 * big.nbytes / seconds(jax.jit(lambda a: a + 1), big)
  print(f"copy {copy / 1e9:.0f} GB/s", flush=True)
  del big
  for case in CHECKS:
    name, dtype, rows, plan = case
    label = f"{name} {jnp.dtype(dtype).name} {rows} rows, {describe(plan)}"
    if verdict := attempt(label, functools.partial(check, *case)):
      print(f"{label}: {verdict}", flush=True)
  best: dict = {}
  with futures.ThreadPoolExecutor(8) as pool:
    for shape in SHAPES:
      if left(limit):
        table(shape, pool, copy, limit, best)
      else:
        print(f"no time for {shape}")
  print("\nbest")
  for (shape, rows), (took, way) in best.items():
    rate = shape[0] * shape[1] / 2 / took / 1e9
    peer = f", {rate / PEER[shape]:.2f} of bitsandbytes" if rows == 1 else ""
    one = best.get((shape, 1), (took, ""))[0]
    print(f"{shape[0]}x{shape[1]}, {rows:2d} rows: {took * 1e6:.1f} us, "
          f"{rate:.0f} GB/s, {rate * 1e9 / copy:.0%} of a copy{peer}, "
          f"{took / one:.2f} of one row's time: {way}")


if __name__ == "__main__":
  main()
