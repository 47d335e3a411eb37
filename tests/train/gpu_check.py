"""A whole QLoRA step on a GPU: every path trains to the same losses, and times.

    python -m tests.train.gpu_check [NAME ...]

A random Llama of about 1.1 B parameters, NF4 with double quantisation, LoRA
r=16 on all linears, 4 x 2048 packed tokens. Prints one line a variant, or of
those named. Not collected by pytest, whose machines have no GPU.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import sys
import time
from unittest import mock

import jax
import numpy as np

from lora_jax import adapters as adapters_lib
from lora_jax import quant
from lora_jax import types
from lora_jax.kernels import attention as attention_lib
from lora_jax.kernels import dequantise
from lora_jax.models import config as config_lib
from lora_jax.models import init
from lora_jax.models import modules
from lora_jax.train import optim
from lora_jax.train import precision
from lora_jax.train import step

CONFIG = config_lib.ModelConfig(
    family="llama", vocab_size=32000, d_model=2048, d_ff=5632, n_layers=22,
    n_heads=32, n_kv_heads=8, head_dim=64)
ROWS, LENGTH, STEPS = 4, 2048, 6
# name: (compute dtype, attention, kernels)
VARIANTS = {
    "bfloat16, plain attention, XLA dequantisation": (
        "bfloat16", "plain", False),
    "bfloat16, plain attention": ("bfloat16", "plain", True),
    "bfloat16, cudnn": ("bfloat16", "cudnn", True),
    "bfloat16, auto, XLA dequantisation": ("bfloat16", "auto", False),
    "bfloat16, auto": ("bfloat16", "auto", True),
    "float16, auto": ("float16", "auto", True),
    "float32, auto": ("float32", "auto", True),
}


def batch() -> types.Batch:
  """Rows of 6 segments and some padding, the same tokens again and again."""
  rng = np.random.default_rng(0)
  segments = np.zeros((1, ROWS, LENGTH), np.int32)
  positions = np.zeros_like(segments)
  for row in range(ROWS):
    cuts = sorted({0, LENGTH - 40, *rng.choice(LENGTH - 100, 5) + 1})
    for n, (start, stop) in enumerate(itertools.pairwise(cuts), 1):
      segments[0, row, start:stop] = n
      positions[0, row, start:stop] = np.arange(stop - start)
  tokens = rng.integers(0, 512, segments.shape).astype(np.int32)
  return types.Batch(
      tokens=tokens, targets=np.roll(tokens, -1, 2),
      loss_weights=(segments > 0).astype(np.float32), positions=positions,
      segment_ids=segments, example_ids=segments)


def run(base, tree, dtype: str, attention: str, **options) -> str:
  """Trains; the losses, seconds of compilation and tokens a second.

  `options` are further fields of `step.Settings`.
  """
  params, frozen = adapters_lib.split(tree)
  state = step.init_state(params, precision.Precision(), dtype)
  settings = step.Settings(
      dtype=dtype, attention=attention_lib.Options(attention, "packed"),
      **options)
  hyper = optim.hyper(optim.OptimConfig(), 1e-3)
  data = jax.device_put(batch())
  losses, times = [], []
  for _ in range(STEPS):
    start = time.perf_counter()
    state, metrics = step.train_step(
        state, frozen, base, data, hyper, jax.random.key(0), model=CONFIG,
        settings=settings)
    losses.append(float(metrics["loss"]))
    times.append(time.perf_counter() - start)
  rate = ROWS * LENGTH / statistics.median(times[1:])
  skipped = int(metrics.get("skipped", 0))
  return (f"loss {losses[0]:.4f} -> {losses[-1]:.4f}, first step "
          f"{times[0]:.0f} s, {rate:,.0f} tok/s"
          + (f", {skipped} skipped" if skipped else ""))


def main() -> None:
  print(jax.devices()[0].device_kind, jax.__version__, flush=True)
  base = init.quantised_base(
      jax.random.key(0), CONFIG, quant.QuantSpec("nf4"))
  _, tree = adapters_lib.build(
      jax.random.key(1), adapters_lib.AdapterConfig(rank=16, alpha=32.0), base,
      modules.paths(CONFIG))
  for name in sys.argv[1:] or VARIANTS:
    dtype, attention, kernels = VARIANTS[name]
    off = (contextlib.nullcontext() if kernels else
           mock.patch.dict(dequantise.DEFAULTS, clear=True))
    jax.clear_caches()
    try:
      with off:
        print(f"{name:48}{run(base, tree, dtype, attention)}", flush=True)
    except Exception as error:  # The other variants are still of interest.
      print(f"{name:48}{type(error).__name__}: {str(error)[:300]}", flush=True)


if __name__ == "__main__":
  main()
