"""Training a model's adapters: what `loop.fit` is given, and what comes of it.

  one run      training = prepare(model, rows, held_out, workdir=...)
               model, outcome = finish(training, loop.fit(*training.run))
  side by side fit([training, ...])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import pathlib
from typing import Any

import jax

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax import types
from lora_jax.api import settings as settings_lib
from lora_jax.data import dataset as dataset_lib
from lora_jax.data import pipeline
from lora_jax.data import virtual
from lora_jax.train import loop
from lora_jax.train import members as members_lib
from lora_jax.train import memory as memory_lib
from lora_jax.train import optim as optim_lib
from lora_jax.train import precision as precision_lib
from lora_jax.train import sinks as sinks_lib
from lora_jax.train import step as step_lib

# An `api.Model`, which this module is a part of.
Model = Any


@dataclasses.dataclass(frozen=True)
class Training:
  """A run that has not begun.

  Attributes:
    run: the arguments of `loop.fit`.
    model: `(params, base) -> Model`.
  """

  run: members_lib.Member
  model: Callable[[types.Tree, types.Tree], Model]

  def fit(self) -> tuple[Model, loop.Outcome]:
    """Runs it; see `Model.train`."""
    one = self.run
    return self.finished(loop.fit(one.task, one.state, one.config, one.folder))

  def finished(self, outcome: loop.Outcome) -> tuple[Model, loop.Outcome]:
    """The trained model, and what happened."""
    return self.model(outcome.state.params, outcome.base), outcome


def prepare(
    model: Model,
    rows: dataset_lib.Dataset,
    held_out: dataset_lib.Dataset | None = None,
    *,
    workdir: str | pathlib.Path,
    config: loop.TrainConfig | None = None,
    optim: optim_lib.OptimConfig | None = None,
    max_length: int | None = None,
    packing: bool = True,
    remat: str = "auto",
    memory: memory_lib.MemoryConfig | None = None,
    precision: precision_lib.Precision | None = None,
    seed: int = 0,
    sample: Callable[[Model], list[str]] | None = None,
    save_best: Callable[[Model, int], None] | None = None,
    sinks: sinks_lib.Sinks | None = None,
    donate: bool = False,
) -> Training:
  """A run of a model's adapters; arguments as of `Model.train`.

  Raises:
    errors.UsageError: for a bad value, or a method that trains nothing.
  """
  config = (config or loop.TrainConfig()).validate()
  optim = (optim or optim_lib.OptimConfig()).validate()
  precision = (precision or precision_lib.Precision()).validate()
  precision_lib.check_frozen_matmul(
      precision.frozen_matmul, model.dtype, model.adapter_config.method)
  params, frozen = adapters_lib.split(model.adapters)
  longest = max_length or int(rows.lengths.max())
  ahead = adapters_lib.virtual_tokens(model.adapters)
  if config.steps and not jax.tree.leaves(params):
    raise errors.UsageError(
        f"adapter.method={model.adapter_config.method} trains nothing; set "
        "train.steps=0, or choose another method")

  def at(params, base):
    return dataclasses.replace(
        model, base=base, adapters=adapters_lib.join(
            precision_lib.widen(params), frozen))

  settings = model.settings(
      layout="packed" if packing else "single", steps=config.steps,
      remat=remat, optimizer=optim.name, precision=precision,
      neftune=config.neftune_noise_alpha)
  evaluate = None if held_out is None else (
      lambda *now: at(*now).evaluate(
          held_out, batch_size=settings_lib.evaluated(
              config.batch_size, held_out)))
  task = loop.Task(
      model=model.config, base=model.base, frozen=frozen,
      batches=pipeline.Batches(
          virtual.ahead(
              rows, **adapters_lib.virtual_places(model.adapters, True)),
          config.batch_size,
          config.accumulation, longest + ahead, packing, seed),
      learning_rates=optim_lib.learning_rates(optim, config.steps),
      optim=optim,
      base_digest=model.replaced,
      memory=settings_lib.memory(model, memory, config.batch_size),
      settings=settings,
      key=jax.random.key(seed),
      place=model._place_batch,
      evaluate=evaluate,
      sample=sample and (lambda *now: sample(at(*now))),
      save_best=save_best and (
          lambda params, base, step: save_best(at(params, base), step)),
      sinks=sinks or sinks_lib.Sinks(), donate=donate)
  state = model._place(step_lib.init_state(
      params, precision, model.dtype, optim.name, model.offload,
      settings.rules))
  return Training(
      members_lib.Member(task, state, config, pathlib.Path(workdir)), at)


def fit(
    trainings: Sequence[Training], note: Callable[[str], None] | None = None,
) -> list[tuple[Model, loop.Outcome] | errors.UserError]:
  """Runs of one kind (`members.kind`) side by side.

  Args:
    trainings: from `prepare`, of models with one base.
    note: see `members.fit`.

  Returns:
    Of each what `Training.fit` returns, or the error that ended it alone.
  """
  found = members_lib.fit([t.run for t in trainings], note)
  return [one if isinstance(one, errors.UserError) else t.finished(one)
          for t, one in zip(trainings, found, strict=True)]
