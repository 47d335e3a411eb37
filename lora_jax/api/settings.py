"""The static choices of a model's training steps."""

from __future__ import annotations

from typing import Any

import jax

from lora_jax.adapters import config as config_lib
from lora_jax.adapters import registry
from lora_jax.adapters import rules
from lora_jax.data import dataset
from lora_jax.train import memory as memory_lib
from lora_jax.train import precision as precision_lib
from lora_jax.train import step as step_lib

# Tokens that an accelerator evaluates at a time, padding counted.
EVALUATED = 8192


def evaluated(batch_size: int, rows: dataset.Dataset) -> int:
  """Rows to evaluate at a time: an accelerator takes more than it trains on,
  which needs no memory for a backward pass.

  Args:
    batch_size: rows trained on at a time.
    rows: what is evaluated.
  """
  if jax.default_backend() == "cpu":
    return batch_size
  return max(batch_size, EVALUATED // int(rows.lengths.max()))


def settings(
    model: Any, *, layout: str, steps: int, remat: str = "auto",
    optimizer: str = "adamw",
    precision: precision_lib.Precision | None = None, neftune: float = 0.0,
) -> step_lib.Settings:
  """The static choices of a training step.

  Args:
    model: an `api.Model`.
    layout: of the rows, "packed" or "single".
    steps: of the run, which some methods divide into phases.
    remat: what the backward pass keeps, a key of `models.remat.POLICIES`.
    optimizer: a key of `optim.OPTIMIZERS`.
    precision: how the state is stored.
    neftune: alpha of the noise on embeddings.

  Raises:
    errors.UsageError: if the method's options do not fit the steps.
  """
  precision = precision or precision_lib.Precision()
  configs = _configs(model)
  return step_lib.Settings(
      dtype=model.dtype, remat=remat,
      noise=neftune > 0 or any(
          config.dropout > 0 or registry.method(config.method).samples
          or getattr(config.options, "module_dropout", 0) > 0
          or getattr(config.options, "samples", False)
          for config in configs.values()),
      optim_dtype=precision.optim_dtype, optimizer=optimizer, mesh=model.mesh,
      frozen_matmul=precision.frozen_matmul,
      attention=model._attention(layout), offload=model.offload,
      rules=rules.of_parts(configs, steps, model.adapters), neftune=neftune)


def memory(
    model: Any, config: memory_lib.MemoryConfig | None, b: int
) -> memory_lib.MemoryConfig:
  """How a step may be made to fit; not by parts, if a method mixes tokens.

  Args:
    model: an `api.Model`.
    config: what was asked for.
    b: rows of a batch.

  Raises:
    errors.UsageError: for a value that cannot be.
  """
  found = (config or memory_lib.MemoryConfig()).validate()
  for one in _configs(model).values():
    if registry.method(one.method).mixes_tokens:
      found = found.whole(b, f"adapter.method={one.method}")
  return found


def _configs(model: Any) -> dict[str, config_lib.AdapterConfig]:
  return {name: part.config for name, part in model.parts.items()} or {
      "": model.adapter_config}
