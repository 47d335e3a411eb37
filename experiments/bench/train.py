"""Steps of fine-tuning: tokens a second, TFLOP/s, memory, compilation.

Random tokens without padding, the same in every step, and a loss over all
positions: it must fall. What is counted as work is said in `flops`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import itertools
import math
import time
from typing import Any

import jax
import numpy as np

from experiments import blocks
from experiments.bench import built as built_lib
from experiments.bench import flops
from experiments.bench import lines
from experiments.bench import settings as settings_lib
from experiments.bench import timing
from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax import types
from lora_jax.adapters import registry
from lora_jax.kernels import attention as attention_lib
from lora_jax.models import config as config_lib
from lora_jax.train import optim as optim_lib
from lora_jax.train import precision as precision_lib
from lora_jax.train import step as step_lib

# Policies by what they keep, the least first; all of `remat.POLICIES` but
# `auto`, which is one of them.
SAVED = ("full", "dots", "named", "none")


def batch(
    shape: tuple[int, int, int], vocab_size: int, packed: int, seed: int = 0
) -> tuple[types.Batch, list[int]]:
  """Random rows and the lengths of their segments.

  Args:
    shape: (a, b, t).
    vocab_size: v.
    packed: segments of a row, cut at random; 0 is one.
    seed: of both.

  Raises:
    errors.UsageError: if a row has fewer tokens than segments.
  """
  rng = np.random.default_rng(seed)
  rows, length = math.prod(shape[:2]), shape[2]
  if packed > length:
    raise errors.UsageError(
        f"train.packed={packed} segments do not fit rows of {length} tokens; "
        "lower it")
  segments = np.zeros((rows, length), np.int32)
  positions = np.zeros_like(segments)
  lengths = []
  for row in range(rows):
    cuts = np.sort(rng.choice(length - 1, max(packed, 1) - 1, False)) + 1
    edges = [0, *cuts.tolist(), length]
    for n, (start, stop) in enumerate(itertools.pairwise(edges), 1):
      segments[row, start:stop] = n
      positions[row, start:stop] = np.arange(stop - start)
      lengths.append(stop - start)
  tokens = rng.integers(0, vocab_size, shape).astype(np.int32)
  fields = (segments.reshape(shape), positions.reshape(shape))
  return types.Batch(
      tokens=tokens, targets=np.roll(tokens, -1, 2),
      loss_weights=np.ones(shape, np.float32), positions=fields[1],
      segment_ids=fields[0], example_ids=fields[0]), lengths


@dataclasses.dataclass(frozen=True)
class Program:
  """A step, and what it is called with.

  Attributes:
    args: positional arguments of `train_step`; the first one is donated.
    statics: its static ones.
    lengths: tokens of every segment.
  """

  args: tuple[Any, ...]
  statics: dict[str, Any]
  lengths: list[int]


def program(
    config: Mapping[str, Any], model: built_lib.Built, shape: tuple[int, int],
    remat: str) -> Program:
  """The step of one case; the state is fresh, the rest shared.

  Raises:
    errors.UsageError: if the method trains nothing; see also `batch`.
  """
  train, compute = config["train"], config["compute"]
  if config["adapter"]["method"] == "none":
    raise errors.UsageError(
        "adapter.method=none trains nothing; use lora, or leave train out of "
        "parts")
  # On the device that will compute it; one without 8-bit floats says so here.
  precision_lib.check_frozen_matmul(
      compute["frozen_matmul"], compute["dtype"], config["adapter"]["method"])
  data, lengths = batch(
      (train["accumulation"], *shape), model.model.vocab_size, train["packed"],
      config["seed"])
  params, frozen = adapters_lib.split(model.adapters)
  precision, optim = blocks.precision(config), blocks.optim(config)
  offload = blocks.offload(config)
  rules = registry.rules(
      blocks.adapter(config), train["steps"], model.adapters)
  state = step_lib.init_state(
      params, precision, compute["dtype"], optim.name, offload, rules)
  layout = "packed" if train["packed"] > 1 else "single"
  settings = step_lib.Settings(
      dtype=compute["dtype"], remat=remat,
      noise=config["adapter"]["dropout"] > 0,
      optim_dtype=precision.optim_dtype, optimizer=optim.name,
      mlp_tiles=compute["mlp_tiles"] or 1, offload=offload,
      frozen_matmul=precision.frozen_matmul, rules=rules,
      attention=attention_lib.Options(compute["attention"], layout))
  return Program(
      (state, frozen, model.base, jax.device_put(data),
       optim_lib.hyper(optim, optim.learning_rate),
       jax.random.key(config["seed"])),
      {"model": model.model, "settings": settings}, lengths)


def measure(
    config: Mapping[str, Any], model: built_lib.Built, shape: tuple[int, int],
    remat: str) -> lines.Line:
  """Compiles a step, runs it and times it; seconds, bytes, nats, rates."""
  made = program(config, model, shape, remat)
  start = time.perf_counter()
  lowered = step_lib.train_step.lower(*made.args, **made.statics)
  lower = time.perf_counter()
  compiled = lowered.compile()
  compilation = time.perf_counter()
  before = peak_bytes()
  (state, *rest), lengths = made.args, made.lengths
  del made  # The first state is donated.
  losses, finite = [], []

  def call():
    nonlocal state
    state, metrics = compiled(state, *rest)
    losses.append(metrics["loss"])
    finite.append(metrics["finite"])
    return metrics

  first = time.perf_counter()
  jax.block_until_ready(call())
  first = time.perf_counter() - first
  train = config["train"]
  times = timing.steps(call, train["steps"], train["warmup"])
  return (rates(config, model.model, lengths, times.median)
          | times.row("step_s")
          | {"lower_s": lower - start, "compile_s": compilation - lower,
             "first_step_s": first}
          | memory(compiled, before) | losses_row(losses, finite))


def losses_row(losses, finite) -> lines.Line:
  """What the losses of all steps, in order, say."""
  values = [float(x) for x in losses]
  return {"loss_first": values[0], "loss_last": values[-1],
          "finite": all(map(bool, finite)), "falling": values[-1] < values[0]}


def rates(
    config: Mapping[str, Any], model: config_lib.ModelConfig,
    lengths: Sequence[int], seconds: float) -> lines.Line:
  """Tokens and useful operations a second of a step over segments."""
  per_token = flops.train_token(
      model, lengths, config["adapter"]["method"] == "full")
  speed = sum(lengths) / seconds
  return {
      "tokens_per_s": speed, "model_tflops": speed * per_token / 1e12,
      "flops_per_token": per_token,
      "matmul_parameters": flops.matmul_parameters(model)}


def peak_bytes() -> int | None:
  """Peak of the device so far; None where it is not counted (CPU)."""
  stats = jax.local_devices()[0].memory_stats() or {}
  return stats.get("peak_bytes_in_use")


def memory(compiled: Any, before: int | None) -> lines.Line:
  """Bytes on the device, as counted by it and as planned by the compiler.

  Args:
    compiled: the step.
    before: the peak before its first run. The step's own peak is known only
      if it is higher; else it is at most that.
  """
  found: lines.Line = {
      "peak_bytes": peak_bytes(), "peak_bytes_before": before}
  planned = compiled.memory_analysis()
  if planned is not None:
    found |= {"argument_bytes": planned.argument_size_in_bytes,
              "temporary_bytes": planned.temp_size_in_bytes}
  return found


def cases(train: Mapping[str, Any]) -> list[tuple[str, tuple[int, int]]]:
  """(policy, shape) of a `train` block.

  The least memory first: a step's peak is known only if it is the highest so
  far.
  """
  shapes = settings_lib.shapes("train.shapes", train["shapes"])
  policies = sorted(blocks.names(train["remat"]), key=SAVED.index)
  return [(remat, shape) for remat in policies
          for shape in sorted(shapes, key=math.prod)]


def run(config: Mapping[str, Any], emit: lines.Emit) -> None:
  """Emits a line for each policy and shape."""
  train = config["train"]
  model = built_lib.build(config)
  for remat, shape in cases(train):
    case = {"part": "train", "name": "step", **model.case,
            "batch": shape[0], "length": shape[1], "remat": remat,
            "packed": train["packed"], "accumulation": train["accumulation"]}
    lines.attempt(emit, case, functools.partial(
        measure, config, model, shape, remat))
