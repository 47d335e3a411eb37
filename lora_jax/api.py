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

from collections.abc import Callable, Sequence
import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax import mesh as mesh_lib
from lora_jax import quant as quant_lib
from lora_jax import types
from lora_jax.adapters import base as base_lib
from lora_jax.data import dataset as dataset_lib
from lora_jax.data import formats
from lora_jax.data import pipeline
from lora_jax.data import sources
from lora_jax.data import templates
from lora_jax.data import tokenizer as tokenizer_lib
from lora_jax.evaluate import generate as generate_lib
from lora_jax.evaluate import perplexity
from lora_jax.export import hf as hf_export
from lora_jax.export import peft
from lora_jax.models import config as config_lib
from lora_jax.models import decoder
from lora_jax.models import hf
from lora_jax.models import load as load_lib
from lora_jax.models import sharding
from lora_jax.train import loop
from lora_jax.train import optim as optim_lib
from lora_jax.train import step as step_lib

read = sources.read
TrainConfig = loop.TrainConfig
OptimConfig = optim_lib.OptimConfig


@dataclasses.dataclass(frozen=True)
class Model:
  """A frozen base, a tokenizer, and perhaps adapters.

  Attributes:
    config: the architecture.
    base: frozen weights.
    tokenizer: a transformers tokenizer.
    fingerprint: sha256 of the source's tensors.
    source: the path or name it was loaded from.
    dtype: compute type, `float32` or `bfloat16`.
    adapters: whole adapter tree; empty before `adapt`.
    adapter_config: what the adapters were made from.
    peft_config: `adapter_config.json` of an adapter that was read.
    mesh: devices to spread over, or None for one.
  """

  config: config_lib.ModelConfig
  base: decoder.Base
  tokenizer: Any
  fingerprint: str
  source: str
  dtype: str = "float32"
  adapters: base_lib.Adapters = dataclasses.field(
      default_factory=base_lib.Adapters)
  adapter_config: adapters_lib.AdapterConfig = adapters_lib.AdapterConfig(
      method="none")
  peft_config: dict[str, Any] | None = None
  mesh: Any = None

  @property
  def paths(self) -> dict[str, list[str]]:
    """Module paths of everything that can be adapted, by target."""
    return module_paths(self.config)

  def adapt(
      self, config: adapters_lib.AdapterConfig | None = None, *,
      seed: int = 0, **fields) -> Model:
    """With fresh adapters.

    Args:
      config: the adapter block; or give its fields by name.
      seed: of the initialisation.
      **fields: of `AdapterConfig`, if `config` is None.

    Raises:
      errors.UsageError: for an unknown method or target, or a bad value.
    """
    config = config or adapters_lib.AdapterConfig(**fields)
    base, tree = adapters_lib.build(
        jax.random.key(seed), config, self.base, self.paths)
    return dataclasses.replace(
        self, base=base, adapters=self._place(tree), adapter_config=config,
        peft_config=None)

  def with_adapter(
      self, folder: str | pathlib.Path, *, dropout: float | None = None
  ) -> Model:
    """With the adapter of a PEFT folder.

    Args:
      folder: holds `adapter_config.json` and `adapter_model.safetensors`.
      dropout: rate of further training; the folder's own by default.

    Raises:
      errors.UserError: if it cannot be read, or belongs to another base.
    """
    loaded = peft.read(
        pathlib.Path(folder), self.paths, module_shapes(self.config))
    if loaded.fingerprint not in (None, self.fingerprint):
      raise errors.UserError(
          f"{folder}: the adapter was trained on a base with fingerprint "
          f"{loaded.fingerprint[:12]}, this one ({self.source}) has "
          f"{self.fingerprint[:12]}; give the model it was trained on")
    tree, config, text = loaded.adapters, loaded.config, loaded.peft_config
    if dropout is not None:
      tree = jax.tree.map(
          lambda a: a.replace(rate=jnp.full_like(a.rate, dropout)), tree,
          is_leaf=lambda x: isinstance(x, base_lib.Adapter))
      config = dataclasses.replace(config, dropout=dropout).validate()
      text = text | {"lora_dropout": dropout}
    return dataclasses.replace(
        self, adapters=self._place(tree), adapter_config=config,
        peft_config=text)

  def encode(
      self, examples: Sequence[formats.Example], *,
      max_length: int | None = None, overlong: str = "error",
      system: str | None = None) -> dataset_lib.Dataset:
    """Tokens and loss weights of examples, of at most `max_length` tokens.

    Raises:
      errors.UserError: see `templates.encode` and `dataset_lib.fit`.
    """
    rows = dataset_lib.of([
        templates.encode(example, self.tokenizer, add_system=system)
        for example in examples])
    limit = max_length or self.config.max_position
    return dataset_lib.fit(rows, limit, overlong)[0]

  def evaluate(
      self, rows: dataset_lib.Dataset, *, batch_size: int = 4
  ) -> perplexity.RowLosses:
    """Losses of every row; see `perplexity.RowLosses`."""
    return self._evaluate(self.adapters, rows, batch_size)

  def train(
      self,
      rows: dataset_lib.Dataset,
      held_out: dataset_lib.Dataset | None = None,
      *,
      workdir: str | pathlib.Path,
      config: loop.TrainConfig | None = None,
      optim: optim_lib.OptimConfig | None = None,
      max_length: int | None = None,
      packing: bool = True,
      remat: str = "named",
      seed: int = 0,
      sample: Callable[[Model], list[str]] | None = None,
      save_best: Callable[[Model, int], None] | None = None,
  ) -> tuple[Model, loop.Outcome]:
    """Trains the adapters; goes on from a checkpoint in `workdir`.

    Args:
      rows: to train on, from `encode`.
      held_out: rows to evaluate on at the start, the end and in between.
      workdir: where metrics and checkpoints go.
      config: how long, how often.
      optim: the optimiser.
      max_length: tokens of a batch row; the longest of `rows` by default.
      packing: several examples a row.
      remat: what the backward pass keeps, a key of `models.remat.POLICIES`.
      seed: of order and dropout.
      sample: generates texts at the start and the end.
      save_best: called with the model whenever an evaluation is the best.

    Returns:
      The trained model, and what happened.

    Raises:
      errors.UserError: see `loop.fit`.
    """
    config = (config or loop.TrainConfig()).validate()
    optim = (optim or optim_lib.OptimConfig()).validate()
    params, frozen = adapters_lib.split(self.adapters)
    if config.steps and not jax.tree.leaves(params):
      raise errors.UsageError(
          f"adapter.method={self.adapter_config.method} trains nothing; set "
          "train.steps=0, or choose another method")

    def model(params):
      return dataclasses.replace(
          self, adapters=adapters_lib.join(params, frozen))

    evaluate = None if held_out is None else (
        lambda params: model(params).evaluate(
            held_out, batch_size=config.batch_size))
    task = loop.Task(
        model=self.config, base=self.base, frozen=frozen,
        batches=pipeline.Batches(
            rows, config.batch_size, config.accumulation,
            max_length or int(rows.lengths.max()), packing, seed),
        learning_rates=optim_lib.learning_rates(optim, config.steps),
        optim=optim,
        settings=step_lib.Settings(
            dtype=self.dtype, remat=remat,
            noise=self.adapter_config.dropout > 0),
        key=jax.random.key(seed),
        place=self._place_batch,
        evaluate=evaluate,
        sample=sample and (lambda params: sample(model(params))),
        save_best=save_best and (
            lambda params, step: save_best(model(params), step)))
    outcome = loop.fit(
        task, step_lib.init_state(params), config, pathlib.Path(workdir))
    return model(outcome.state.params), outcome

  def generate(
      self, prompts: Sequence[Sequence[int] | np.ndarray], **options
  ) -> list[list[int]]:
    """Token ids that follow each prompt; options of `generate.generate`."""
    options = {"stop_ids": self.stop_ids, "dtype": self.dtype} | options
    return generate_lib.generate(
        self.config, self.base, self.adapters, [list(p) for p in prompts],
        **options)

  def chat(self, prompts: Sequence[str], **options) -> list[str]:
    """The assistant's answer to each user message, as text."""
    tokens = [
        templates.encode_prompt([{"role": "user", "content": p}],
                                self.tokenizer) for p in prompts]
    return [self.tokenizer.decode(ids, skip_special_tokens=True)
            for ids in self.generate(tokens, **options)]

  @property
  def stop_ids(self) -> tuple[int, ...]:
    """Tokens that end a turn: the model's and the tokenizer's."""
    ids = {*self.config.eos_ids, self.tokenizer.eos_token_id}
    return tuple(sorted(i for i in ids if i is not None))

  def save(self, folder: str | pathlib.Path) -> None:
    """Saves the adapters in PEFT's format.

    Raises:
      errors.UserError: if PEFT has no counterpart (`save_merged` does), or
        the folder cannot be written.
    """
    config = self.peft_config or peft.peft_config(
        self.adapter_config, self.adapters, self.paths, self.source)
    peft.write(pathlib.Path(folder), self.adapters, config, self.paths,
               self.fingerprint)

  def save_merged(
      self, folder: str | pathlib.Path, dtype: str = "float32") -> None:
    """Saves base and adapters as one Hugging Face model, dequantised."""
    hf_export.write(
        pathlib.Path(folder), self.config, self.base, self.adapters,
        dtype=dtype, tokenizer=self.tokenizer)

  def _evaluate(self, tree, rows, batch_size):
    batches = (
        (self._place_batch(batch), indices)
        for batch, indices in pipeline.eval_batches(rows, batch_size))
    return perplexity.row_losses(
        tree, self.base, batches, model=self.config, dtype=self.dtype)

  def _place(self, tree: types.Tree) -> types.Tree:
    return tree if self.mesh is None else sharding.put(self.mesh, tree)

  def _place_batch(self, batch: types.Batch) -> types.Batch:
    return batch if self.mesh is None else mesh_lib.put_batch(
        self.mesh, batch)


def load(
    path: str, *,
    quant: str | quant_lib.QuantSpec | None = None,
    dtype: str = "float32",
    skip: Sequence[str] = load_lib.SKIP,
    chat_template: str | None = None,
    mesh: mesh_lib.MeshConfig | None = None,
) -> Model:
  """Loads a model and its tokenizer.

  Args:
    path: a Hugging Face folder, a `.gguf` file, or a hub name.
    quant: a format's name, or a whole spec; None leaves the checkpoint as it
      is. One that comes quantised keeps its own codes; "none" dequantises.
    dtype: compute type, and the type of what is not quantised.
    skip: targets that are not quantised.
    chat_template: Jinja text, if the tokenizer's own is not wanted.
    mesh: how to spread over devices; all of them by default.

  Raises:
    errors.UserError: see `models.load.load`.
  """
  errors.choose("compute.dtype", dtype, {"float32": 0, "bfloat16": 0})
  if isinstance(quant, str):
    quant = quant_lib.QuantSpec(format=quant)
  source = load_lib.open_source(path)
  loaded = load_lib.convert(source, quant, dtype, skip)
  tokenizer = tokenizer_lib.load(source.label, chat_template)
  devices = mesh_lib.make(mesh or mesh_lib.MeshConfig())
  spread = devices if devices.size > 1 else None
  base = loaded.base if spread is None else sharding.put(spread, loaded.base)
  return Model(
      config=loaded.config, base=base, tokenizer=tokenizer,
      fingerprint=loaded.fingerprint, source=path, dtype=dtype, mesh=spread)


def module_paths(config: config_lib.ModelConfig) -> dict[str, list[str]]:
  """Paths of a model's projections and outer modules, by target."""
  found = {}
  for slot in hf.slots(config):
    if slot.leaf == "weight" and len(slot.shape) == 2:
      layers = range(config.n_layers) if slot.stacked else (None,)
      found[slot.target] = [
          hf.hf_name(layer, slot.target, "") for layer in layers]
  return found


def module_shapes(
    config: config_lib.ModelConfig) -> dict[str, tuple[int, int]]:
  """(in, out) of the same; an embedding's are (v, d)."""
  return {
      slot.target: slot.shape if slot.target == "embed_tokens"
      else slot.shape[::-1]
      for slot in hf.slots(config)
      if slot.leaf == "weight" and len(slot.shape) == 2}
