"""Few rows times a 4-bit weight on a GPU: right, and how fast by which plan.

    python -m tests.kernels.matmul_gpu [--seconds 110] [--only-default]

Every way of the kernel against dequantise-then-dot in float32, then plans,
shapes and rows timed; the same with scales of 8 bits; bitsandbytes, if it is
there; and a summary. These are processes of their own, the riskiest last: a
kernel that faults takes its process's GPU context along. What fails prints a
line, and the rest goes on; after `--seconds` nothing new begins. Not collected
by pytest, whose machines have no GPU.

A time is that of one call among many in one program, over weights of 0.5 GB,
so that none is in the cache. GB/s count the packed codes alone; the share is of
a copy's bytes, read and written, in the same run.
"""

from __future__ import annotations

import argparse
from concurrent import futures
import dataclasses
import functools
import itertools
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp

from lora_jax import quant
from lora_jax.kernels import dequantise
from lora_jax.kernels import matmul_gpu
from lora_jax.kernels import plain
from lora_jax.quant import double
from lora_jax.quant import dynamic
from tests.kernels import matmul_shapes as shapes_lib

Plan = matmul_gpu.Plan
BLOCK, SHAPES = shapes_lib.BLOCK, shapes_lib.SHAPES
ROWS = [1, 16, 4, 32]  # What matters most, first.
# GB/s of packed bytes that bitsandbytes 0.50.2 reads on an H100, one row.
PEER = dict(zip(SHAPES, (777, 947, 1018, 1073), strict=True))
NESTED = "nf4, nested"  # With scales of 8 bits.
CHECKS = {
    "nf4": [
        ("nf4", jnp.bfloat16, 1, Plan(16, 4)),
        ("nf4", jnp.bfloat16, 9, Plan(8, 8)),
        ("nf4", jnp.bfloat16, 16, Plan(16, 4)),
        ("nf4", jnp.bfloat16, 32, Plan(8, 1)),
        ("nf4", jnp.float16, 4, Plan(16, 2, ahead=2)),
        ("nf4", jnp.bfloat16, 17, Plan(4, 4, terms=1)),
        ("nf4", jnp.bfloat16, 2, Plan(16, 2, decode="prmt")),
        ("fp4", jnp.bfloat16, 16, Plan(8, 4)),
        ("int4", jnp.bfloat16, 8, Plan(16, 3, cluster=False)),
        ("int4_affine", jnp.bfloat16, 5, Plan(8, 4)),
        ("nf4", jnp.bfloat16, 1, None),
        ("int4_affine", jnp.float16, 32, None)],
    NESTED: [
        (NESTED, jnp.bfloat16, 3, Plan(8, 2)),
        (NESTED, jnp.bfloat16, 1, None),
        (NESTED, jnp.bfloat16, 16, None)],
}


def plans(shape, rows) -> list[Plan | None]:
  """To time, 4 at most; None is `plan_for`'s."""
  default = matmul_gpu.plan_for(rows, *shape, 2)
  other = dataclasses.replace(
      default, splits=default.splits * 2 if default.splits < 4
      else default.splits // 2)
  if rows == 1:  # Another order of memory, and half the table's reads.
    return [None, other, dataclasses.replace(default, width=8),
            dataclasses.replace(default, terms=1)]
  if rows == 16:
    return [None, other, Plan(8, other.splits), Plan(8, default.splits)]
  return [None, other] if rows == 32 else [None]


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
    statistics = statistics[1:] if name == NESTED else statistics
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


def table(name, shape, default, pool, flags) -> None:
  """Prints a shape's lines: of the default plan, or of what else there is."""
  ins, columns = shape
  weights = draw(name, shapes_lib.weights(shape), ins, columns)
  programs = []
  for rows in ROWS:
    x = jax.random.normal(
        jax.random.key(rows), (1, rows, ins)).astype(jnp.bfloat16)
    ways = {describe(plan): kernel(name, plan)
            for plan in plans(shape, rows) if (plan is None) == default}
    if rows == 16 and not default:
      ways["dequantise, then dot"] = plainly
    for way, one in ways.items():
      way += ", nested" if name == NESTED else ""
      label = f"{ins}x{columns}, {rows:2d} rows, {way}"
      lowered = attempt(label, functools.partial(many(one).lower, x, weights))
      if lowered is not None:
        programs.append((label, rows, way, x, pool.submit(lowered.compile)))

  def each(program, x):
    return seconds(program.result(), x, weights) / len(weights)

  for label, rows, way, x, program in programs:
    if time.time() > flags.until:
      program.cancel()
      continue
    took = attempt(label, functools.partial(each, program, x))
    if took is not None:
      shapes_lib.report(flags.results, shape, rows, way, took)


def part(name: str, flags) -> None:
  """Checks and times one kind of scales."""
  if name != NESTED:
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    big = jnp.zeros(2**28, jnp.float32)
    took = seconds(jax.jit(lambda a: a + 1), big)
    print(f"copy {2 * big.nbytes / took / 1e9:.0f} GB/s", flush=True)
    with open(flags.results, "a") as file:
      file.write(f'[[0, 0, 0, "copy"], {took / 2 / big.nbytes}]\n')
    del big
  for case in CHECKS[name]:
    form, dtype, rows, plan = case
    if flags.only_default and plan is not None:
      continue
    label = f"{form} {jnp.dtype(dtype).name} {rows} rows, {describe(plan)}"
    if verdict := attempt(label, functools.partial(check, *case)):
      print(f"{label}: {verdict}", flush=True)
  with futures.ThreadPoolExecutor(8) as pool:
    once = flags.only_default or name == NESTED
    for default, shape in itertools.product([True, False][:2 - once], SHAPES):
      if time.time() < flags.until:
        table(name, shape, default, pool, flags)
      else:
        print(f"no time for {shape}, {'default' if default else 'others'}")


def summary(found: dict) -> None:
  """Of each shape and number of rows, the default and what was better."""
  copy = 1 / found.pop((0, 0, 0, "copy"), math.nan)
  for shape in SHAPES:
    for rows in sorted(ROWS):
      mine = {way: took for (*key, way), took in found.items()
              if tuple(key) == (*shape, rows)}
      peers = {way: mine.pop(way) for way in ("gemv_4bit", "matmul_4bit")
               if way in mine}
      mine.pop("dequantise, then dot", None)
      for way in ("default", "default, nested"):
        if way not in mine:
          continue
        took, rate = mine[way], shapes_lib.packed(shape) / mine[way]
        line = (f"{shape[0]}x{shape[1]}, {rows:2d} rows, {way}: "
                f"{took * 1e6:.1f} us, {rate / 1e9:.0f} GB/s, "
                f"{rate / copy:.0%} of a copy")
        if one := found.get((*shape, 1, way)):
          line += f", {took / one:.2f} of one row's time"
        for peer, its in peers.items():
          line += f", {its / took:.2f} times as fast as {peer}"
        if rows == 1 and not peers:
          line += (f", {rate / 1e9 / PEER[shape]:.2f} times as fast as "
                   "bitsandbytes 0.50.2 once was")
        print(line)
      best = min(mine, key=mine.__getitem__, default="default")
      if not best.startswith("default") and "default" in mine:
        print(f"  better: {best}, {mine[best] / mine['default']:.2f} of the "
              "default's time")


def main() -> None:
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument("--seconds", type=float, default=110)
  parser.add_argument("--only-default", action="store_true",
                      help="no other plans")
  parser.add_argument("--part", choices=CHECKS, help=argparse.SUPPRESS)
  parser.add_argument("--until", type=float, default=math.inf,
                      help=argparse.SUPPRESS)
  parser.add_argument("--results", help=argparse.SUPPRESS)
  flags = parser.parse_args()
  if flags.part:
    part(flags.part, flags)
    return
  end = time.time() + flags.seconds
  with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "results")
    open(path, "w").close()
    more = ["--only-default"] if flags.only_default else []
    # Each with what must be left for those after it, in seconds.
    for module, args, after in [
        ("matmul_gpu", ["--part", "nf4", *more], 45),
        ("matmul_peer", [], 30), ("matmul_gpu", ["--part", NESTED, *more], 0)]:
      until = end - after * min(1, flags.seconds / 110)
      print(f"\n{module} {' '.join(args)}", flush=True)
      try:
        code = subprocess.run(
            [sys.executable, "-m", f"tests.kernels.{module}", *args,
             "--until", str(until), "--results", path],
            timeout=max(until - time.time(), 0) + 8, check=False).returncode
        if code:
          print(f"{module} ended with {code}")
      except subprocess.TimeoutExpired:
        print(f"{module} took too long")
    print("\nsummary")
    summary(shapes_lib.results(path))


if __name__ == "__main__":
  main()
