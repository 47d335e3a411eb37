"""The quickstart's step on a CPU, ours and PEFT + bitsandbytes', in turn.

    python -m tests.train.cpu_peer [ROUNDS] [NAME=VALUE ...]

SmolLM2-135M-Instruct in NF4 with double quantisation, LoRA r=16 on all
linears, AdamW, float32, 4 rows of 128 tokens, the same tokens on both sides.
A round is a step of ours and a step of theirs, so that a machine that others
use slows both; prints median and minimum of each, wall clock and processor
seconds of all threads, and the ratio of the medians. NAME=VALUE changes ours,
e.g. `remat=full`. Not collected by pytest.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np

from configs import quickstart
from experiments import blocks
from lora_jax import adapters as adapters_lib
from lora_jax import types
from lora_jax.train import optim
from lora_jax.train import step as step_lib

ROWS, LENGTH, WARMUP = 4, 128, 1


def tokens(vocabulary: int) -> np.ndarray:
  """`[ROWS, LENGTH + 1]`; a step does not depend on what they say."""
  return np.random.default_rng(0).integers(
      0, vocabulary, (ROWS, LENGTH + 1)).astype(np.int32)


def ours(model: Any, settings: step_lib.Settings):
  """A function that takes a step and returns its loss."""
  params, frozen = adapters_lib.split(model.adapters)
  state = step_lib.init_state(params, optimizer=settings.optimizer)
  drawn = tokens(model.config.vocab_size)
  ones = np.ones((1, ROWS, LENGTH), np.int32)
  batch = types.Batch(
      tokens=drawn[None, :, :-1], targets=drawn[None, :, 1:],
      loss_weights=ones.astype(np.float32),
      positions=ones * np.arange(LENGTH, dtype=np.int32), segment_ids=ones,
      example_ids=ones * np.arange(ROWS, dtype=np.int32)[:, None])
  hyper = optim.hyper(optim.OptimConfig(), 1e-3)

  def step():
    nonlocal state
    state, metrics = step_lib.train_step(
        state, frozen, model.base, batch, hyper, jax.random.key(0),
        model=model.config, settings=settings)
    return float(metrics["loss"])

  return step


def theirs(folder: str):
  """The same in PyTorch, from the model's weights in `folder`."""
  import peft
  import torch
  import transformers

  transformers.utils.logging.disable_progress_bar()
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  torch.manual_seed(0)
  model = transformers.AutoModelForCausalLM.from_pretrained(
      folder, dtype=torch.float32, device_map="cpu",
      quantization_config=transformers.BitsAndBytesConfig(
          load_in_4bit=True, bnb_4bit_quant_type="nf4",
          bnb_4bit_use_double_quant=True,
          bnb_4bit_compute_dtype=torch.float32))
  model = peft.get_peft_model(model, peft.LoraConfig(
      r=16, lora_alpha=32, target_modules="all-linear"))
  model.config.use_cache = False
  model.train()
  drawn = torch.from_numpy(tokens(model.config.vocab_size)).long()
  trained = [p for p in model.parameters() if p.requires_grad]
  adam = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)

  def step():
    logits = model(input_ids=drawn[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), drawn[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    adam.step()
    adam.zero_grad()
    return float(loss.detach())

  return step, sum(p.numel() for p in trained)


def main() -> None:
  rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
  changes: Any = dict(x.split("=") for x in sys.argv[2:])
  config = quickstart.get_config().to_dict()
  plain = blocks.load(config | {"quant": config["quant"] | {"format": "none"}})
  model = blocks.load(config).adapt(blocks.adapter(config), donate=True)
  settings = dataclasses.replace(
      step_lib.Settings(attention=model._attention("packed")), **changes)
  with tempfile.TemporaryDirectory() as folder:
    plain.save_merged(folder)
    del plain
    peer, count = theirs(folder)
  assert count == adapters_lib.trainable_size(model.adapters), count
  sides = {"lora_jax": ours(model, settings), "PEFT": peer}
  clocks = {"wall": time.perf_counter, "processor": time.process_time}
  times: dict[str, dict[str, list[float]]] = {
      clock: {name: [] for name in sides} for clock in clocks}
  with jax.default_matmul_precision("highest"):
    for i in range(WARMUP + rounds):
      for name, step in sides.items():
        start = {clock: now() for clock, now in clocks.items()}
        loss = step()
        for clock, now in clocks.items():
          times[clock][name].append(now() - start[clock])
        print(f"{i} {name:10} loss {loss:.4f}  " + "  ".join(
            f"{clock} {times[clock][name][-1]:.2f} s" for clock in clocks),
              flush=True)
  for clock, found in times.items():
    medians = {}
    for name, steps in found.items():
      medians[name] = statistics.median(steps[WARMUP:])
      print(f"{clock:10} {name:10} median {medians[name]:.2f} s, minimum "
            f"{min(steps[WARMUP:]):.2f} s, of {rounds}")
    print(f"{clock:10} PEFT / lora_jax: "
          f"{medians['PEFT'] / medians['lora_jax']:.2f}")


if __name__ == "__main__":
  main()
