"""What a step takes on a GPU: predicted, measured, and where it is too much.

    python -m tests.train.memory_gpu_check [NAME ...]

The model and the batch of `gpu_check` (1.1 B parameters, 4 x 2048 tokens).
Every choice must train to the losses of the first. The peak can only be read
where it is a new one, hence the order; `-` says that it was none. `oom` runs
`loop.fit` on a batch that cannot fit and must go on with a smaller program.
Prints one line each, or of those named. Not collected by pytest, whose
machines have no GPU.
"""

from __future__ import annotations

import dataclasses
import pathlib
import statistics
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import adapters as adapters_lib
from lora_jax import types
from lora_jax.kernels import attention as attention_lib
from lora_jax.models import modules
from lora_jax.train import footprint
from lora_jax.train import loop
from lora_jax.train import memory
from lora_jax.train import optim
from lora_jax.train import step as step_lib
from tests.train import gpu_check

STEPS = 6
# Rising memory; costs compare `named` in two micro-batches with `full`.
CHOICES = {
    "full, 2 micro-batches": memory.Choice("full", parts=2),
    "full, 4 tiles": memory.Choice("full", 4),
    "full": memory.Choice("full"),
    "named, 2 micro-batches": memory.Choice("named", parts=2),
    "named": memory.Choice("named"),
    "none": memory.Choice("none"),
}
SETTINGS = step_lib.Settings(
    dtype="bfloat16", remat="auto",
    attention=attention_lib.Options("auto", "packed"))


def stats() -> dict[str, int]:
  return jax.local_devices()[0].memory_stats() or {}


def opened(base, tree) -> footprint.Step:
  params, frozen = adapters_lib.split(tree)
  return footprint.Step(
      gpu_check.CONFIG, SETTINGS, step_lib.init_state(params), frozen, base,
      gpu_check.batch(), optim.hyper(optim.OptimConfig(), 1e-3),
      jax.random.key(0), jax.device_put)


def run(step: footprint.Step, choice: memory.Choice) -> tuple[list, str]:
  """Losses; GiB bounded, predicted and measured, and tokens a second."""
  start = time.perf_counter()
  bound, need = step.bound(choice), step.need(choice)
  compiled = time.perf_counter() - start
  held = stats().get("bytes_in_use", 0) - footprint.resident(step.trees)
  before = stats().get("peak_bytes_in_use", 0)
  state = jax.tree.map(jnp.copy, step.state)  # The others need theirs.
  batch = jax.device_put(choice.split(step.batch))
  losses, times = [], []
  for _ in range(STEPS):
    start = time.perf_counter()
    state, metrics = step_lib.train_step(
        state, step.frozen, step.base, batch, step.hyper, step.key,
        model=step.model, settings=choice.settings(SETTINGS))
    losses.append(float(metrics["loss"]))
    times.append(time.perf_counter() - start)
  peak = stats().get("peak_bytes_in_use", 0)
  gib = lambda n: f"{n / memory.GIB:6.2f}"
  speed = step.batch.tokens.size / statistics.median(times[2:])
  return losses, (
      f"{gib(bound)} {gib(need + held)} "
      f"{gib(peak) if peak > before else '     -'}  {speed:8,.0f} tok/s  "
      f"(compiled in {compiled:.0f} s)")


class Wide:
  """The batch, repeated until its rows are too many."""

  def __init__(self, times: int):
    self.times = times

  def batch(self, step: int) -> types.Batch:
    del step
    return jax.tree.map(
        lambda x: np.tile(x, (1, self.times, 1)), gpu_check.batch())

  def row_indices(self, step: int):
    return [step]


def exhausted(step: footprint.Step) -> str:
  """A run whose first program needs more than the device has."""
  whole = stats()["bytes_limit"]
  rows = step.bound(memory.Choice("none")) / gpu_check.ROWS
  times = int(1.2 * whole / rows / gpu_check.ROWS) + 1
  task = loop.Task(
      model=step.model, base=step.base, frozen=step.frozen,
      batches=Wide(times), learning_rates=np.full(2, 1e-3, np.float32),
      optim=optim.OptimConfig(), key=step.key, place=jax.device_put,
      settings=dataclasses.replace(SETTINGS, remat="none"))
  with tempfile.TemporaryDirectory() as folder:
    outcome = loop.fit(
        task, jax.tree.map(jnp.copy, step.state), loop.TrainConfig(steps=2),
        pathlib.Path(folder))
  assert outcome.plan is not None, "it did fit"
  return f"went on with {outcome.plan.choice}; {outcome.progress.step} steps"


def main() -> None:
  device = jax.devices()[0]
  print(f"jax {jax.__version__}, {device.device_kind}, "
        f"{stats().get('bytes_limit', 0) / memory.GIB:.1f} GiB for JAX")
  base = gpu_check.quantised()
  _, tree = adapters_lib.build(
      jax.random.key(0), adapters_lib.AdapterConfig(rank=16, alpha=32.0),
      base, modules.paths(gpu_check.CONFIG))
  step = opened(base, tree)
  print(f"{'':24}  bound   need   peak GiB", flush=True)
  first, failed = None, False
  for name in sys.argv[1:] or [*CHOICES, "oom"]:
    try:
      if name == "oom":
        text = exhausted(step)
      else:
        losses, text = run(step, CHOICES[name])
        first = first or losses
        worst = np.abs(np.subtract(losses, first)).max()
        failed |= not worst < 0.02
        text += f"  losses within {worst:.4f}"
    except Exception as error:  # One choice must not hide the others.
      failed = True
      text = f"FAILED {type(error).__name__}: {str(error)[:200]}"
    print(f"{name:24} {text}", flush=True)
  if failed:
    sys.exit("a choice failed, or trained to other losses")


if __name__ == "__main__":
  main()
