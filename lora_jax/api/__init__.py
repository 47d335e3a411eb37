"""Load, adapt, train, generate: the whole of lora_jax in one class.

  model = api.load("HuggingFaceTB/SmolLM2-135M-Instruct", quant="nf4")
  model = model.adapt(method="dora", rank=16)
  rows = model.encode(api.read("train.jsonl"), max_length=512)
  model, result = model.train(rows[100:], rows[:100], workdir="runs/mine")
  print(model.chat(["Write a haiku about frozen weights."])[0])
  model.save("adapter")

A `Model` is immutable: every method returns a new one.
"""

from __future__ import annotations

from lora_jax.api.load import base_folder
from lora_jax.api.load import load
from lora_jax.api.model import Model
from lora_jax.data.sources import read
from lora_jax.train.loop import TrainConfig
from lora_jax.train.optim import OptimConfig

__all__ = [
    "Model", "OptimConfig", "TrainConfig", "base_folder", "load", "read"]
