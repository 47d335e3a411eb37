"""Offloading on a GPU: the same losses, and what it costs.

    python -m tests.train.offload_gpu [NAME ...]

Prints one line for each case of `DEFAULT`, or for those of `CASES` that are
named. First a small model, whose
losses must not depend on where anything is; then Llama-2-7B's geometry and
Llama-70B's, 4 x 2048 tokens, NF4 with double quantisation, LoRA r=16 on all
linears, full remat. A base is one random layer repeated, in the host's memory
when it is to be there: only sizes matter for the times. 70B with its base on
the device needs 53 GiB. Not collected by pytest, whose machines have no GPU.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import adapters as adapters_lib
from lora_jax import host as host_lib
from lora_jax import quant
from lora_jax import types
from lora_jax.kernels import attention as attention_lib
from lora_jax.models import config as config_lib
from lora_jax.models import decoder
from lora_jax.models import init
from lora_jax.models import modules
from lora_jax.train import optim
from lora_jax.train import step

SMALL = config_lib.ModelConfig(
    family="llama", vocab_size=2048, d_model=1024, d_ff=2816, n_layers=8,
    n_heads=8, n_kv_heads=8, head_dim=128)
LLAMA_7B = config_lib.ModelConfig(
    family="llama", vocab_size=32000, d_model=4096, d_ff=11008, n_layers=32,
    n_heads=32, n_kv_heads=32, head_dim=128)
LLAMA_70B = config_lib.ModelConfig(
    family="llama", vocab_size=32000, d_model=8192, d_ff=28672, n_layers=80,
    n_heads=64, n_kv_heads=8, head_dim=128)
# name: (model, what is offloaded, remat, steps)
CASES = {
    "small": (SMALL, (), "full", 4),
    "small base": (SMALL, ("base",), "full", 4),
    "small base named": (SMALL, ("base",), "named", 4),
    "small activations": (SMALL, ("activations",), "named", 4),
    "small optimiser": (SMALL, ("optimiser",), "full", 4),
    "small all": (SMALL, tuple(host_lib.KINDS), "full", 4),
    "7B": (LLAMA_7B, (), "full", 5),
    "7B base": (LLAMA_7B, ("base",), "full", 5),
    "7B activations": (LLAMA_7B, ("activations",), "full", 5),
    "7B optimiser": (LLAMA_7B, ("optimiser",), "full", 5),
    "70B base": (LLAMA_70B, ("base",), "full", 4),
    "70B all": (LLAMA_70B, tuple(host_lib.KINDS), "full", 4),
    "70B": (LLAMA_70B, (), "full", 4),
}
# Under three minutes; the others by name.
DEFAULT = ("small", "small base named", "small all", "7B", "7B base",
           "70B base", "70B")
ROWS, LENGTH = 4, 2048
TOLERANCE = 2e-3  # bfloat16; programs of another order of operations.


def base(config: config_lib.ModelConfig, host: bool) -> decoder.Base:
  """One random layer, quantised and repeated; bfloat16 outside the layers."""
  one = init.random_base(
      jax.random.key(0), dataclasses.replace(config, n_layers=1),
      jnp.bfloat16)
  layers = {}
  for name, module in one.layers.items():
    if isinstance(module, decoder.Linear):
      module = module.replace(weight=quant.quantize(
          module.weight, quant.QuantSpec("nf4")))
    layers[name] = module

  def repeated(x):
    # Made on the device, and moved: the host alone takes minutes.
    whole = jnp.repeat(x, config.n_layers, 0)
    if host and not host_lib.stays(x):
      whole = jax.block_until_ready(
          jax.device_put(whole, host_lib.home(x.sharding)))
    return whole

  return one.replace(layers=jax.tree.map(repeated, layers))


def batch(config: config_lib.ModelConfig) -> types.Batch:
  """Whole rows of one segment."""
  tokens = np.random.default_rng(0).integers(
      0, min(config.vocab_size, 512), (1, ROWS, LENGTH)).astype(np.int32)
  positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
  ones = np.ones_like(tokens)
  return jax.device_put(types.Batch(
      tokens=tokens, targets=np.roll(tokens, -1, 2),
      loss_weights=ones.astype(np.float32), positions=positions,
      segment_ids=ones, example_ids=ones))


def run(config, offload, remat, steps) -> tuple[list[float], str]:
  """(losses, a line)."""
  began = time.perf_counter()
  frozen_base, tree = adapters_lib.build(
      jax.random.key(1), adapters_lib.AdapterConfig(rank=16, alpha=32.0),
      base(config, "base" in offload), modules.paths(config))
  params, frozen = adapters_lib.split(tree)
  state = step.init_state(params, dtype="bfloat16", offload=offload)
  del tree, params
  settings = step.Settings(
      dtype="bfloat16", remat=remat, offload=offload,
      attention=attention_lib.Options(layout="single"))
  hyper, data = optim.hyper(optim.OptimConfig(), 1e-3), batch(config)
  arguments = (state, frozen, frozen_base, data, hyper, jax.random.key(0))
  made = time.perf_counter() - began
  compiled = step.train_step.lower(
      *arguments, model=config, settings=settings).compile()
  took = time.perf_counter() - began - made
  size = compiled.memory_analysis()
  device = (size.argument_size_in_bytes + size.temp_size_in_bytes
            + size.output_size_in_bytes - size.alias_size_in_bytes)
  losses, times = [], []
  for _ in range(steps):
    start = time.perf_counter()
    state, metrics = compiled(state, *arguments[1:])
    losses.append(float(metrics["loss"]))
    times.append(time.perf_counter() - start)
  rate = ROWS * LENGTH / statistics.median(times[1:])
  peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
  return losses, (
      f"{rate:8,.0f} tok/s, program {device / 2**30:5.1f} GiB on the device, "
      f"peak so far {peak / 2**30:.1f}, "
      f"{size.host_argument_size_in_bytes / 2**30:5.1f} + "
      f"{size.host_temp_size_in_bytes / 2**30:.1f} GiB of the host; loss "
      f"{losses[0]:.4f} -> {losses[-1]:.4f}; made in {made:.0f} s, compiled "
      f"in {took:.0f} s")


def main() -> None:
  print(jax.devices()[0].device_kind, jax.__version__, flush=True)
  wanted: dict[str, list[float]] = {}
  for name in sys.argv[1:] or DEFAULT:
    size = name.partition(" ")[0]
    try:
      losses, line = run(*CASES[name])
      first = wanted.setdefault(size, losses)
      worst = max(abs(a / b - 1) for a, b in zip(losses, first))
      line += "" if worst <= TOLERANCE else f"; NOT EQUAL: {worst:.1e}"
      print(f"{name:18}{line}", flush=True)
    except Exception as error:  # The other cases are still of interest.
      print(f"{name:18}{type(error).__name__}: {str(error)[:300]}", flush=True)
    jax.clear_caches()


if __name__ == "__main__":
  main()
