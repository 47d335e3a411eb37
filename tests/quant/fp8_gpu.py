"""8-bit products on a GPU: right, then how fast, then a whole step.

    python -m tests.quant.fp8_gpu [check] [step] [products] [large]

The first three by default. `check` compares products with numpy's, and those
taken together with each by itself; `products` times both directions at
Llama-2-7B's shapes, 8192 tokens, each beside bfloat16's; `step` is that of
`tests.train.gpu_check`, with products apart as well, and without Triton's
products, which take XLA long to choose from. One line a variant; one that
fails says so, and the others go on. Not collected by pytest, whose machines
have no GPU.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import subprocess
import sys
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import adapters as adapters_lib
from lora_jax import quant
from lora_jax.adapters import lora
from lora_jax.kernels import attention as attention_lib
from lora_jax.models import decoder
from lora_jax.models import init
from lora_jax.models import modules
from lora_jax.quant import fp8
from lora_jax.quant import fp8_joint
from lora_jax.train import optim
from lora_jax.train import precision
from lora_jax.train import step
from tests.train import gpu_check

TOKENS = 8192
SHAPES = [(4096, 4096), (4096, 11008), (11008, 4096)]
RECIPES = [name for name, recipe in fp8.RECIPES.items() if recipe is not None]


def attempt(label: str, run) -> None:
  """Prints the line that `run()` returns, or why there is none."""
  jax.clear_caches()
  try:
    found = run()
  except Exception as error:  # The other variants are still of interest.
    found = f"{type(error).__name__}: {str(error)[:300]}"
  print(f"{label:44}{found}", flush=True)


def weight(rows: int, columns: int):
  w = jax.random.normal(jax.random.key(rows), (rows, columns)) / rows**0.5
  return quant.quantize(w, quant.QuantSpec("nf4"))


def both(name: str):
  """`(x, w, g) -> (y, dx)` of one projection."""

  def run(x, w, g):
    layer = fp8.marked({"p": decoder.Linear(w)}, name)
    y, pull = jax.vjp(lambda x: quant.matmul(x, layer["p"].weight), x)
    return y, pull(g)[0]

  return jax.jit(run)


def check(name: str) -> str:
  """Largest error of y and dx, in units of what the roundings explain.

  The operands' roundings are known exactly; what is left are the sum's, of at
  most 2^-13 of the sum of magnitudes if the accumulator has 14 bits, and the
  result's, 2^-8 of itself.
  """
  w = weight(512, 256)
  x = jax.random.normal(jax.random.key(1), (64, 512), jnp.bfloat16)
  x = x.at[0].mul(1000).at[1].set(0)
  g = 1e-4 * jax.random.normal(jax.random.key(2), (64, 256), jnp.bfloat16)
  y, dx = both(name)(x, w, g)
  recipe = fp8.RECIPES[name]
  assert recipe is not None
  wide = lambda pair: np.float64(pair[0].astype(jnp.float32)) * np.float64(
      pair[1])
  w8 = wide(jax.jit(fp8.rounded_weight)(w))
  worst = []
  for got, a, how, b in ((y, x, recipe.activation, w8),
                         (dx, g, recipe.gradient, w8.T)):
    a8 = wide(jax.jit(fp8.rounded, static_argnums=1)(a, how))
    want, sizes = a8 @ b, np.abs(a8) @ np.abs(b)
    allowed = 2.0**-13 * sizes + 2.0**-8 * np.abs(want) + 1e-30
    worst.append((np.abs(np.float64(got) - want) / allowed).max())
  verdict = "ok" if max(worst) <= 1 else "WRONG"
  return f"{verdict}: y {worst[0]:.3f}, dx {worst[1]:.3f} of the bound"


def apart():
  """A context in which projections of one x are products of their own."""
  return mock.patch.object(fp8_joint, "together", lambda *unused: [])


def check_together(name: str) -> str:
  """Largest of the errors, in the mean square, that taking two adapted
  projections together makes of what each gives by itself."""
  recipe = fp8.RECIPES[name]
  assert recipe is not None
  weights = [fp8.InFloat8(weight(512, n), recipe) for n in (256, 384)]
  x = jax.random.normal(jax.random.key(1), (64, 512), jnp.bfloat16)
  draw = lambda key, *shape: 0.05 * jax.random.normal(
      jax.random.key(key), shape)
  low = [lora.LoRA(draw(2, 512, 16), draw(3, 16, n), jnp.float32(2),
                   jnp.float32(0), jnp.int32(16)) for n in (256, 384)]
  gs = [1e-4 * jax.random.normal(jax.random.key(n), (64, n), jnp.bfloat16)
        for n in (256, 384)]

  def run(x, low):
    factors = [(one.a, one.b) for one in low]

    def project(x, factors):
      made = [one.replace(a=a, b=b)
              for one, (a, b) in zip(low, factors, strict=True)]
      return adapters_lib.project_all(x, weights, made, [None, None], True)

    y, pull = jax.vjp(project, x, factors)
    return y, pull(gs)

  together = jax.jit(run)(x, low)
  with apart():
    each = jax.jit(lambda *args: run(*args))(x, low)
  errors = [float(np.linalg.norm(np.float64(a) - np.float64(b))
                  / np.linalg.norm(np.float64(b)))
            for a, b in zip(*map(jax.tree.leaves, (together, each)),
                            strict=True)]
  verdict = "ok" if max(errors) < 0.01 else "WRONG"
  return f"{verdict}: {max(errors):.4f} (bfloat16's own are 0.004)"


def seconds(run, *args) -> float:
  """Median of one call, several in flight."""
  jax.block_until_ready(run(*args))
  times = []
  for _ in range(5):
    start = time.perf_counter()
    jax.block_until_ready([run(*args) for _ in range(8)])
    times.append((time.perf_counter() - start) / 8)
  return statistics.median(times)


def product(name: str, rows: int, columns: int, tokens: int = TOKENS) -> str:
  """TFLOP/s of y and dx, expansion and rounding included, and of the product
  of operands that are there already."""
  w = weight(rows, columns)
  x = jax.random.normal(jax.random.key(1), (tokens, rows), jnp.bfloat16)
  g = jax.random.normal(jax.random.key(2), (tokens, columns), jnp.bfloat16)
  tera = 2 * tokens * rows * columns / 1e12
  whole = both(name)

  def forward(x, w):
    layer = fp8.marked({"p": decoder.Linear(w)}, name)
    return quant.matmul(x, layer["p"].weight)

  y = seconds(jax.jit(forward), x, w)
  all_of_it = seconds(whole, x, w, g)
  if fp8.RECIPES[name] is None:
    operands = x, quant.dequantize(w, jnp.bfloat16).T
  else:
    operands = x.astype(fp8.E4M3), quant.dequantize(w).T.astype(fp8.E4M3)
  alone = seconds(jax.jit(functools.partial(
      jax.lax.dot_general, dimension_numbers=(((1,), (1,)), ((), ())),
      preferred_element_type=jnp.bfloat16)), *operands)
  return (f"alone {tera / alone:6.0f}, y {tera / y:6.0f}, dx "
          f"{tera / max(all_of_it - y, 1e-9):6.0f} TFLOP/s")


def expansion(rows: int, columns: int) -> str:
  """Microseconds that a weight takes to become an operand."""
  w = weight(rows, columns)
  ways = {
      "i o, bfloat16": lambda w: w.dequantize(jnp.bfloat16),
      "i o": lambda w: fp8.rounded_weight(w)[0],
      "o i, by words": lambda w: fp8.turned(fp8.rounded_weight(w)[0]),
      "o i, by bytes": lambda w: fp8.rounded_weight(w)[0].T,
  }
  return ", ".join(f"{label} {1e6 * seconds(jax.jit(way), w):.0f}"
                   for label, way in ways.items()) + " us"


def large(name: str) -> None:
  """A shape that has crashed XLA's compiler, in a process of its own."""
  command = [sys.executable, "-m", "tests.quant.fp8_gpu", "one-large", name]
  label = f"{name} 16384 x 8192 x 28672"
  try:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60)
  except subprocess.TimeoutExpired:
    print(f"{label:44}not done in 60 s", flush=True)
    return
  last = (done.stdout if done.returncode == 0 else done.stderr).strip()
  print(last.splitlines()[-1][:300] if done.returncode == 0 else
        f"{label:44}exit {done.returncode}: {last[-300:]}", flush=True)


def one_step(base, tree, name: str, separate: bool, options) -> str:
  """Losses, seconds of compilation, milliseconds and GiB of a step."""
  params, frozen = adapters_lib.split(tree)
  # What is donated must not be what the next variant starts from.
  state = jax.tree.map(jnp.copy, step.init_state(
      params, precision.Precision(), "bfloat16"))
  settings = step.Settings(
      dtype="bfloat16", remat="named", frozen_matmul=name,
      attention=attention_lib.Options("auto", "packed"))
  rest = (frozen, base, jax.device_put(gpu_check.batch()),
          optim.hyper(optim.OptimConfig(), 1e-3), jax.random.key(0))
  start = time.perf_counter()
  with apart() if separate else contextlib.nullcontext():
    run = step.train_step.lower(
        state, *rest, model=gpu_check.CONFIG, settings=settings).compile(
            compiler_options=options)
  compiling = time.perf_counter() - start
  losses, times = [], []
  for _ in range(gpu_check.STEPS + 4):
    start = time.perf_counter()
    state, metrics = run(state, *rest)
    losses.append(float(metrics["loss"]))
    times.append(time.perf_counter() - start)
  temporary = run.memory_analysis().temp_size_in_bytes / 2**30
  return (f"loss {losses[0]:.4f} -> {losses[-1]:.4f}, compiled in "
          f"{compiling:.0f} s, {1e3 * statistics.median(times[2:]):.1f} ms, "
          f"{temporary:.1f} GiB")


def steps() -> None:
  """The step of `tests.train.gpu_check` with and without 8 bits."""
  base = init.quantised_base(
      jax.random.key(0), gpu_check.CONFIG, quant.QuantSpec("nf4"))
  _, tree = adapters_lib.build(
      jax.random.key(1), adapters_lib.AdapterConfig(rank=16, alpha=32.0), base,
      modules.paths(gpu_check.CONFIG))
  plain = {"xla_gpu_enable_triton_gemm": False}
  for label, *how in (
      ("auto", "auto", False, {}),
      ("fp8_tensor", "fp8_tensor", False, {}),
      ("fp8", "fp8", False, {}),
      ("fp8_tensor, apart", "fp8_tensor", True, {}),
      ("auto, no Triton", "auto", False, plain),
      ("fp8_tensor, no Triton", "fp8_tensor", False, plain),
      ("fp8, no Triton", "fp8", False, plain)):
    attempt(f"step, {label}", functools.partial(one_step, base, tree, *how))


def main() -> None:
  asked = sys.argv[1:] or ["check", "products", "step"]
  if asked[0] == "one-large":
    attempt(f"{asked[1]} 16384 x 8192 x 28672", functools.partial(
        product, asked[1], 8192, 28672, 16384))
    return
  if "large" in asked:  # Before this process takes the card's memory.
    large("fp8_tensor")
  print(jax.devices()[0].device_kind, jax.__version__, flush=True)
  if "check" in asked:
    for name in RECIPES:
      attempt(f"check, {name}", functools.partial(check, name))
      attempt(f"check, {name}, together",
              functools.partial(check_together, name))
  if "step" in asked:
    steps()
  if "products" in asked:
    attempt("4096 x 4096 becomes", functools.partial(expansion, 4096, 4096))
    for rows, columns in SHAPES:
      for name in fp8.RECIPES:
        attempt(f"{name}, {TOKENS} x {rows} x {columns}",
                functools.partial(product, name, rows, columns))


if __name__ == "__main__":
  main()
