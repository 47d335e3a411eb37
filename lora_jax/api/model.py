"""A model with what may be done with it, as one class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax import mesh as mesh_lib
from lora_jax import types
from lora_jax.adapters import assemble
from lora_jax.adapters import base as base_lib
from lora_jax.adapters import depth
from lora_jax.adapters import hybrid
from lora_jax.api import parts as parts_lib
from lora_jax.api import settings as settings_lib
from lora_jax.api import training as training_lib
from lora_jax.data import dataset as dataset_lib
from lora_jax.data import formats
from lora_jax.data import pipeline
from lora_jax.data import templates
from lora_jax.data import virtual
from lora_jax.evaluate import generate as generate_lib
from lora_jax.evaluate import perplexity
from lora_jax.export import difference as difference_lib
from lora_jax.export import hf as hf_export
from lora_jax.export import hybrid as hybrid_export
from lora_jax.export import peft
from lora_jax.export import whole
from lora_jax.kernels import attention as attention_lib
from lora_jax.models import config as config_lib
from lora_jax.models import decoder
from lora_jax.models import hf
from lora_jax.models import load as load_lib
from lora_jax.models import modules
from lora_jax.models import sharding
from lora_jax.train import loop
from lora_jax.train import statistics
from lora_jax.train import step as step_lib


@dataclasses.dataclass(frozen=True)
class Model:
  """A frozen base, a tokenizer, and perhaps adapters.

  Attributes:
    config: the architecture.
    base: frozen weights.
    tokenizer: a transformers tokenizer.
    fingerprint: sha256 of the source's tensors.
    source: the path or name it was loaded from.
    dtype: compute type, one of `precision.COMPUTE`.
    adapters: whole adapter tree; empty before `adapt`.
    adapter_config: what the adapters were made from; of several parts the
      first's.
    peft_config: `adapter_config.json` of an adapter that was read.
    parts: of several methods in one model, by name, the innermost first;
      empty where there is one (`adapters.several`).
    mesh: devices to spread over, or None for one.
    attention: what computes attention, a key of `kernels.attention.CHOICES`.
    replaced: digest of the weights that the adapters' start replaced in the
      base (see `adapters.starts`), or None.
    new_tokens: ids of the tokens that `load` was asked to add.
    resized: whether the vocabulary is larger than the source's.
    offload: keys of `host_lib.KINDS`, what is kept in host memory.
    drawn: where the weights come from if they are not those of `source`.
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
  parts: Mapping[str, parts_lib.Part] = dataclasses.field(
      default_factory=dict)
  mesh: Any = None
  attention: str = "auto"
  replaced: str | None = None
  new_tokens: tuple[int, ...] = ()
  resized: bool = False
  offload: tuple[str, ...] = ()
  drawn: load_lib.Source | None = None

  @property
  def paths(self) -> dict[str, list[str]]:
    """Module paths of everything that can be adapted, by target."""
    return modules.paths(self.config)

  def adapt(
      self, config: hybrid.Configs | None = None, *,
      rows: dataset_lib.Dataset | None = None, batch_size: int = 4,
      seed: int = 0, donate: bool = False, **fields) -> Model:
    """With fresh adapters.

    Args:
      config: the adapter block; or give its fields by name. Several, in a
        list or by name, stand in one model, the innermost first; see
        `adapters.several`.
      rows: to train on, from `encode`; for starts that look at some of them.
      batch_size: rows at a time, as in `evaluate`.
      seed: of the initialisation.
      donate: whether an init that replaces base weights writes over those of
        this model, which is then of no more use; large bases fit once.
      **fields: of `AdapterConfig`, if `config` is None.

    Raises:
      errors.UsageError: for an unknown method or target, a bad value, or
        without rows for a start that looks at them.
    """
    if config is None:
      config = adapters_lib.AdapterConfig(**fields)
    self._check_whole()
    configs = {
        name: parts_lib.with_ids(one, self.tokenizer, self.source)
        for name, one in parts_lib.configs(config, self.new_tokens).items()}
    name, first = next(iter(configs.items()))
    originals, stats = self._originals(), None
    if rows is not None and first.start().informed is not None:
      configs[name], stats = statistics.gather(
          first, self._some(rows, first.init_batches, batch_size, seed),
          base=self.base, paths=self.paths, model=self.config,
          settings=step_lib.Settings(
              dtype=self.dtype, remat="full", mesh=self.mesh,
              attention=self._attention("single"), offload=self.offload),
          originals=originals)
    model = self._replicated(parts_lib.replication(configs))
    base, tree = adapters_lib.build(
        jax.random.key(seed), configs if name else configs[name], self.base,
        model.paths, originals, donate, modules.geometry(model.config), stats,
        model.config.layer_order)
    return model._with(base, tree, configs[name], None, {
        n: parts_lib.Part(one) for n, one in configs.items() if n})

  def _replicated(self, replication):
    """The deeper model that `adapter.layer_replication` asks for."""
    if self.config.layer_order:
      raise errors.UsageError(
          "adapter.layer_replication has changed this model's layers; load "
          "the model again for another adapter")
    return dataclasses.replace(self, config=self.config.replicated(
        depth.order(replication, self.config.n_layers)))

  def _some(self, rows, number, batch_size, seed):
    """The first batches of an epoch, one example a row, on the devices."""
    ways = mesh_lib.ways(self.mesh)
    batches = pipeline.Batches(
        rows, -(-batch_size // ways) * ways, 1, int(rows.lengths.max()), False,
        seed)
    return [self._place_batch(jax.tree.map(lambda x: x[0], batches.batch(n)))
            for n in range(min(number, batches.steps_per_epoch))]

  def _with(self, base, tree, config, text, parts):
    """With these adapters, and a base that their start may have changed."""
    taken = parts_lib.taken(tree, parts)
    replaced = None
    if taken:
      base = self._place(base)
      replaced = adapters_lib.starts.digest(base, taken)
    return dataclasses.replace(
        self, base=base, adapters=self._place(tree), adapter_config=config,
        peft_config=text, parts=parts, replaced=replaced)

  def _check_whole(self):
    if self.replaced is not None:
      raise errors.UsageError(
          f"adapter.init={self.adapter_config.init} has changed this model's "
          "base; load the model again for another adapter")

  def with_adapter(
      self, folder: str | pathlib.Path, *, dropout: float | None = None,
      donate: bool = False, uncut: bool = False
  ) -> Model:
    """With the adapter of a PEFT folder, or the parts of several.

    Args:
      folder: holds `adapter_config.json` and `adapter_model.safetensors`, or
        `hybrid.json` (`export.hybrid`).
      dropout: rate of further training; the folder's own by default.
      donate: see `adapt`.
      uncut: see `peft.read`.

    Raises:
      errors.UserError: if it cannot be read, or belongs to another base.
    """
    folder = pathlib.Path(folder)
    names = hybrid_export.order(folder)
    if names is not None:
      return parts_lib.read(self, folder, names, dropout)
    model = self._replicated(peft.replication(folder))
    loaded = peft.read(
        folder, model.paths, modules.shapes(model.config),
        hf.fused_modules(model.config), modules.geometry(model.config), uncut)
    if loaded.fingerprint not in (None, self.fingerprint):
      raise errors.UserError(
          f"{folder}: the adapter was trained on a base with fingerprint "
          f"{loaded.fingerprint[:12]}, this one ({self.source}) has "
          f"{self.fingerprint[:12]}; give the model it was trained on")
    tree, config, text = loaded.adapters, loaded.config, loaded.peft_config
    targets, overrides = whole.overrides(
        model.config, self.base, text.get("modules_to_save") or (),
        loaded.saved, str(folder))
    tree = dataclasses.replace(tree, overrides=overrides)
    config = dataclasses.replace(config, modules_to_save=targets)
    if dropout is not None:
      tree = adapters_lib.with_rate(tree, dropout)
      config = dataclasses.replace(config, dropout=dropout).validate()
      text = peft.with_dropout(text, config)
    base = self.base
    if config.start().replaces:
      base, tree = self._replaced(loaded, tree, donate)
    tree = adapters_lib.beside(tree, base, model.config.layer_order)
    found = model._with(base, tree, config, text, {})
    if loaded.replaced not in (None, found.replaced):
      raise errors.UserError(
          f"{folder}: the adapter was trained beside base weights with digest "
          f"{loaded.replaced[:12]}, adapter.init={config.init} makes "
          f"{found.replaced[:12]} of this base; use the quant block it was "
          "trained with, on the same kind of machine")
    return found

  def _replaced(self, loaded, tree, donate):
    """(base, adapters with A0 and B0) from which a folder's training began."""
    self._check_whole()
    start, given = loaded.config.start(), None
    if start.informed is not None:  # A0 and B0 are in the folder.
      given = {
          name: (a, b) if name in tree.layers else (a[None], b[None])
          for name, (a, b) in adapters_lib.starts.taken(tree).items()}
    elif loaded.replaced is None and start.options:
      # PEFT's randomised SVD draws from torch's generator: what it took out of
      # the base is known up to that draw. The exact SVD is the limit.
      start = adapters_lib.starts.choose("pissa")
    base, factors = adapters_lib.starts.replace(
        start, self.base, assemble.placements(tree),
        self._originals(), donate, given)
    return base, adapters_lib.starts.attached(tree, factors)

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
    """Losses of every row; see `perplexity.RowLosses`.

    Args:
      rows: from `encode`.
      batch_size: rows at a time, rounded up to what the mesh divides.
    """
    ways = mesh_lib.ways(self.mesh)
    rows = virtual.ahead(rows, **adapters_lib.virtual_places(self.adapters))
    return self.row_losses(
        pipeline.eval_batches(rows, -(-batch_size // ways) * ways))

  def train(
      self,
      rows: dataset_lib.Dataset,
      held_out: dataset_lib.Dataset | None = None,
      *,
      workdir: str | pathlib.Path,
      **options: Any,
  ) -> tuple[Model, loop.Outcome]:
    """Trains the adapters; goes on from a checkpoint in `workdir`.

    Args:
      rows: to train on, from `encode`.
      held_out: rows to evaluate on at the start, the end and in between.
      workdir: where metrics and checkpoints go.
      **options: of `training.prepare`:
        config: `TrainConfig`, how long, how often.
        optim: `OptimConfig`, the optimiser.
        max_length: tokens of a batch row; the longest of `rows` by default.
        packing: several examples a row.
        remat: what the backward pass keeps, a key of `models.remat.POLICIES`.
        memory: `MemoryConfig`, how a step is made to fit in the device's.
        precision: how the state is stored, and float16's loss scale.
        seed: of order and dropout.
        sample: generates texts of a model at the start and the end.
        save_best: called with the model and the step whenever an evaluation
          is the best.
        sinks: where metrics go beside the work directory; see `sinks.Sinks`.
        donate: whether this model's base may move to host memory, for good,
          if `memory` needs it there.

    Returns:
      The trained model, and what happened.

    Raises:
      errors.UserError: see `loop.fit`.
    """
    return training_lib.prepare(
        self, rows, held_out, workdir=workdir, **options).fit()

  settings = settings_lib.settings

  def generate(
      self, prompts: Sequence[Sequence[int] | np.ndarray], **options
  ) -> list[list[int]]:
    """Token ids that follow each prompt; options of `generate.generate`."""
    defaults: dict[str, Any] = {
        "stop_ids": self.stop_ids, "dtype": self.dtype,
        "attention": self._attention("single")}
    return generate_lib.generate(
        self.config, self.base, self.adapters, [list(p) for p in prompts],
        mesh=self.mesh, **(defaults | options))

  def chat(self, prompts: Sequence[str], **options) -> list[str]:
    """The assistant's answer to each user message, as text."""
    tokens = [
        templates.encode_prompt([{"role": "user", "content": p}],
                                self.tokenizer) for p in prompts]
    return [self.tokenizer.decode(ids, skip_special_tokens=True)
            for ids in self.generate(tokens, **options)]

  @property
  def stop_ids(self) -> tuple[int, ...]:
    """Tokens that end a turn: the model's, tokenizer's and template's."""
    ids = {*self.config.eos_ids, self.tokenizer.eos_token_id,
           templates.end_of_turn(self.tokenizer)}
    return tuple(sorted(i for i in ids if i is not None))

  def save(
      self, folder: str | pathlib.Path, *, difference: bool = False) -> None:
    """Saves the adapters in PEFT's format; of several, a folder each.

    Adapters that started by replacing base weights (`adapters.starts`) need
    them replaced again when they are read: `with_adapter` does so, exactly;
    PEFT does so for PiSSA and OLoRA on an unquantised base. What a start made
    of rows is in the folder, which is a difference for PEFT. The *difference*
    is an ordinary LoRA of twice the rank on the original weights. It computes
    what was trained if the base is not quantised; if it is, what was trained
    beside the quantised residual now stands beside the original weights, and
    differs by the residual's quantisation error. (`save_merged` is exact.)

    Args:
      folder: where.
      difference: whether to write the difference instead.

    Raises:
      errors.UserError: if PEFT has no counterpart (`save_merged` does), or
        the folder cannot be written.
    """
    if self.parts:
      return parts_lib.save(self, pathlib.Path(folder), difference)
    config = self.peft_config or peft.peft_config(
        self.adapter_config, self.adapters, self.paths, self.source)
    tree, replaced, began = self.adapters, self.replaced, None
    if replaced is not None and not adapters_lib.starts.derived(
        self.adapter_config.init):
      began = {key: config[key] for key in difference_lib.BEGAN}
    if replaced is not None and (difference or began):
      tree, config = difference_lib.convert(tree, config)
    if difference:
      replaced = began = None
    peft.write(
        pathlib.Path(folder), tree, config, self.paths, self.fingerprint,
        hf.fused_modules(self.config), replaced,
        whole.tables(tree, self.base) if self.resized else None,
        self.tokenizer if self.new_tokens else None, began)

  @property
  def mergeable(self) -> tuple[str, ...]:
    """Those of several parts that can be merged while others are kept."""
    return parts_lib.mergeable(self)

  def save_merged(
      self, folder: str | pathlib.Path, dtype: str = "float32",
      parts: Sequence[str] | None = None) -> None:
    """Saves base and adapters as one Hugging Face model, dequantised.

    Args:
      folder: where.
      dtype: of the weights.
      parts: which of several parts are merged; all by default. The others are
        saved in its folder `adapter`: they are adapters of the merged model.

    Raises:
      errors.UserError: if a part cannot be merged (while others are kept), or
        the folder cannot be written.
    """
    merged, rest = parts_lib.split(self, parts)
    hf_export.write(
        pathlib.Path(folder), self.config, self.base, merged.adapters,
        dtype=dtype, tokenizer=self.tokenizer)
    if rest is not None:
      dataclasses.replace(rest, source=str(folder)).save(
          pathlib.Path(folder) / parts_lib.REST)

  def row_losses(
      self, batches: Iterable[tuple[types.Batch, np.ndarray]]
  ) -> perplexity.RowLosses:
    """`evaluate` for batches made by the caller.

    Args:
      batches: (batch `[b, t]`, indices of its first rows); b a multiple of
        `mesh.ways(self.mesh)`.
    """
    return perplexity.row_losses(
        self.adapters, self.base,
        ((self._place_batch(batch), indices) for batch, indices in batches),
        model=self.config, dtype=self.dtype, mesh=self.mesh,
        attention=self._attention("single"))

  def _attention(self, layout: str) -> attention_lib.Options:
    return attention_lib.Options(self.attention, layout, mesh=self.mesh)

  def _place(self, tree: types.Tree) -> types.Tree:
    return tree if self.mesh is None else sharding.put(self.mesh, tree)

  def _originals(self):
    return load_lib.originals(self.drawn or self.source, self._whole)

  def _whole(self, array: types.Array) -> jax.Array:
    """Not cut: on every device."""
    return jnp.asarray(array) if self.mesh is None else mesh_lib.put(
        self.mesh, array, (None,) * array.ndim)

  def _place_batch(self, batch: types.Batch) -> types.Batch:
    return batch if self.mesh is None else mesh_lib.put_batch(self.mesh, batch)
