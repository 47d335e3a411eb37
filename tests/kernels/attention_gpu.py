"""Attention on an NVIDIA GPU: errors, leaks and times of every kernel.

  python tests/kernels/attention_gpu.py

Needs jax with CUDA, and tokamax for its rows. Not a pytest: what fails is
printed, and the rest goes on. Errors are of bfloat16 inputs against the plain
path in float32, as a share of the largest value.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import statistics
import sys
import time
import traceback

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.kernels import attention
from lora_jax.kernels.attention import api
from lora_jax.kernels.attention import base
from lora_jax.kernels.attention import cudnn
from lora_jax.kernels.attention import plain
from lora_jax.kernels.attention import tokamax

PATHS = {
    "plain": plain.run,
    "cudnn": functools.partial(cudnn.attend, name="cudnn"),
    "tokamax": functools.partial(tokamax.attend, name="mosaic_gpu"),
}


def inputs(b, t, h, k, e, layout, seed=0, **fields):
  """A bfloat16 call; packed rows hold 6 segments and some padding."""
  rng = np.random.default_rng(seed)
  segments = np.zeros((b, t), np.int32)
  positions = np.zeros((b, t), np.int32)
  for row in range(b):
    end = t - int(rng.integers(0, t // 8))
    cuts = [0, end]
    if layout == "packed":
      cuts = sorted({0, end, *rng.choice(end - 1, 5, replace=False) + 1})
    for n, (start, stop) in enumerate(itertools.pairwise(cuts), 1):
      segments[row, start:stop] = n
      positions[row, start:stop] = np.arange(stop - start)
  keys = jax.random.split(jax.random.key(seed), 3)
  q, kk, v = (jax.random.normal(key, (b, t, n, e)).astype(jnp.bfloat16)
              for key, n in zip(keys, (h, k, k)))
  at, within = jnp.asarray(positions), jnp.asarray(segments)
  windows = fields.pop("windows", ())
  return base.Call(q, kk, v, at, at, within, within, options=base.Options(
      layout=layout, windows=windows), **fields)


def program(run, call):
  """(qkv, cotangent, segments, window) -> (output, gradients), jitted."""

  @jax.jit
  def both(qkv, cotangent, segments, window):
    def attend(qkv):
      q, k, v = qkv
      return run(dataclasses.replace(
          call, q=q, k=k, v=v, q_segments=segments, kv_segments=segments,
          window=window if window is not None else call.window))

    out, pull = jax.vjp(attend, qkv)
    return out, *pull(cotangent.astype(out.dtype))[0]

  traced = call.window if isinstance(call.window, jax.Array) else None
  return lambda qkv, cotangent: both(
      qkv, cotangent, call.q_segments, traced)


def real(call):
  return (np.asarray(call.q_segments) > 0)[..., None, None]


def cotangent(call):
  draw = jax.random.normal(jax.random.key(9), call.q.shape, jnp.bfloat16)
  return jnp.where(real(call), draw, 0)


def exact(call):
  wide = dataclasses.replace(
      call, q=call.q.astype(jnp.float32), k=call.k.astype(jnp.float32),
      v=call.v.astype(jnp.float32))
  with jax.default_matmul_precision("highest"):
    found = program(plain.run, wide)(
        (wide.q, wide.k, wide.v), cotangent(call).astype(jnp.float32))
  return [np.asarray(x) for x in found]


def errors(found, wanted, keep):
  share = []
  for x, y in zip(found, wanted):
    x = np.asarray(x, np.float32)
    if not np.isfinite(x).all():
      return "NOT FINITE"
    share.append(np.abs((x - y) * keep).max() / np.abs(y * keep).max())
  return " ".join(f"{s:.1e}" for s in share)


def leak(run, call):
  """Bits of segment 1 that change when all other keys and values do."""
  go, slope = program(run, call), cotangent(call)
  before = go((call.q, call.k, call.v), slope)
  mine = (call.q_segments == 1)[..., None, None]
  after = go(tuple(jnp.where(mine, x, 3 - x)
                   for x in (call.q, call.k, call.v)),
             jnp.where(mine | ~real(call), slope, slope + 1))
  again = go((call.q, call.k, call.v), slope)
  changed, noise = (
      [float(jnp.abs(jnp.where(mine, x - y, 0)).max())
       for x, y in zip(before, other)] for other in (after, again))
  if not any(changed):
    return "none, bit-equal"
  return f"differs by {max(changed):.1e} (repeated run: {max(noise):.1e})"


def milliseconds(go, *args, n=10):
  jax.block_until_ready(go(*args))
  times = []
  for _ in range(7):
    start = time.perf_counter()
    for _ in range(n):
      out = go(*args)
    jax.block_until_ready(out)
    times.append((time.perf_counter() - start) / n * 1e3)
  return statistics.median(times)


def times(run, call):
  forward = jax.jit(lambda q, k, v, segments: run(dataclasses.replace(
      call, q=q, k=k, v=v, q_segments=segments, kv_segments=segments)))
  qkv = (call.q, call.k, call.v)
  one = milliseconds(forward, *qkv, call.q_segments)
  two = milliseconds(program(run, call), qkv, cotangent(call))
  return f"forward {one:.3f} ms, with backward {two:.3f} ms"


def attempt(label, make):
  start = time.perf_counter()
  try:
    text = make()
  except Exception as error:  # Say so, and go on.
    line = (str(error).strip() or repr(error)).splitlines()[0][:200]
    text = f"FAILED {type(error).__name__}: {line}"
    if "-v" in sys.argv:
      traceback.print_exc()
  print(f"{label:58s} {text}  [{time.perf_counter() - start:.1f} s]",
        flush=True)


def main() -> None:
  device = jax.devices()[0]
  print(f"jax {jax.__version__}, {device.device_kind}, compute capability "
        f"{base.compute_capability(device)}, tokamax "
        f"{'' if tokamax.installed() else 'not '}installed")
  small = (2, 1024, 8, 2)
  mixed = {"window": jnp.int32(256), "windows": (256, 2**30)}
  cases = {
      "single e=128": inputs(*small, 128, "single"),
      "packed e=128": inputs(*small, 128, "packed"),
      "packed e=64": inputs(*small, 64, "packed"),
      "single e=256": inputs(*small, 256, "single"),
      "packed e=256": inputs(*small, 256, "packed"),
      "single, window": inputs(*small, 128, "single", window=256),
      "single, traced window": inputs(*small, 128, "single", **mixed),
      "packed, traced window": inputs(*small, 128, "packed", **mixed),
      "packed, soft cap, scale": inputs(
          *small, 128, "packed", softcap=5.0, scale=0.2),
      "packed, t=200": inputs(2, 200, 8, 2, 128, "packed"),
  }
  print("\nerrors of output, dq, dk, dv")
  for name, call in cases.items():
    try:
      wanted = exact(call)
    except Exception as error:
      print(f"{name}: the reference failed: {error}")
      continue
    for path, run in PATHS.items():
      if path == "cudnn" and call.softcap is not None:
        continue
      attempt(f"{name}: {path}", lambda run=run, call=call, wanted=wanted:
              errors(program(run, call)((call.q, call.k, call.v),
                                        cotangent(call)),
                     wanted, real(call)))
  print("\nleaks into segment 1")
  for name in ("single e=128", "packed e=128", "packed, traced window"):
    for path, run in PATHS.items():
      attempt(f"{name}: {path}", lambda run=run, name=name:
              leak(run, cases[name]))
  print("\nempty rows are finite")
  for layout in ("single", "packed"):
    call = inputs(2, 256, 8, 2, 128, layout)
    none = call.q_segments.at[1].set(0)
    call = dataclasses.replace(call, q_segments=none, kv_segments=none)
    for path, run in PATHS.items():
      attempt(f"{layout}: {path}", lambda run=run, call=call: str(all(
          bool(jnp.isfinite(x).all()) for x in program(run, call)(
              (call.q, call.k, call.v), cotangent(call)))))
  print("\nwhat auto takes, 4 x 2048, 32 heads on 8, e=128, and times")
  for layout in ("single", "packed"):
    call = inputs(4, 2048, 32, 8, 128, layout)
    attempt(f"{layout}: auto", lambda call=call:
            api.chosen(call).__name__.rpartition(".")[2])
    for path, run in PATHS.items():
      attempt(f"{layout}: {path}", lambda run=run, call=call:
              times(run, call))
  call = inputs(4, 2048, 32, 8, 128, "single")
  for name in ("auto", "cudnn", "tokamax"):
    options = dataclasses.replace(call.options, implementation=name)
    attempt(f"single, entry point: {name}", lambda options=options: times(
        lambda c: attention.attention(
            c.q, c.k, c.v, c.q_positions, c.kv_positions, c.q_segments,
            c.kv_segments, options=options), call))


if __name__ == "__main__":
  main()
