"""Reading an adapter folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
import safetensors

from lora_jax import errors
from lora_jax.adapters import assemble
from lora_jax.adapters import base as base_lib
from lora_jax.adapters import config as config_lib
from lora_jax.adapters import depth as depth_lib
from lora_jax.adapters import method as method_lib
from lora_jax.adapters import registry
from lora_jax.adapters import runs
from lora_jax.adapters import starts
from lora_jax.adapters import targets as targets_lib
from lora_jax.adapters import tokens as tokens_lib
from lora_jax.export import difference
from lora_jax.export import fused as fused_lib
from lora_jax.export import whole
from lora_jax.export.peft import names as names_lib

# Outside of the layers; stacked targets have a module in each of them.
OUTER = ("embed_tokens", "lm_head")
# Frozen weights that PEFT saves too when an adapter is on one of the two, or
# the vocabulary was resized; the parts of paths that its wrappers add to them.
COPIES = ("model.embed_tokens.weight", "lm_head.weight")
WRAPPERS = (".base_layer", ".original_module", ".modules_to_save",
            ".token_adapter")


@dataclasses.dataclass(frozen=True)
class Loaded:
  """What `read` returns.

  Attributes:
    config: the adapter block that this folder amounts to.
    adapters: the tree, stacked for the model.
    peft_config: `adapter_config.json` as it stands; `write` takes it back.
    fingerprint: of the base it was trained on, if this code wrote it.
    replaced: digest of the base weights that its start replaced, likewise.
    saved: tensors of modules that are trained whole, by Hugging Face's names;
      see `whole.overrides`.
  """

  config: config_lib.AdapterConfig
  adapters: base_lib.Adapters
  peft_config: dict[str, Any]
  fingerprint: str | None
  replaced: str | None = None
  saved: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def read(
    folder: pathlib.Path,
    paths: Mapping[str, Sequence[str]],
    shapes: Mapping[str, tuple[int, ...]],
    fused: fused_lib.Fused | None = None,
    geometry: base_lib.Geometry | None = None,
    uncut: bool = False,
) -> Loaded:
  """Reads an adapter folder for a model.

  Args:
    folder: holds `adapter_config.json` and `adapter_model.safetensors`.
    paths: module paths of the model by target.
    shapes: `(in, out)` of each target.
    fused: see `write`.
    geometry: the model's sizes; methods that adapt no projection need them.
    uncut: whether a target's layers stay one stack (see `runs`), as
      those of several methods in one model have to.

  Returns:
    The adapter.

  Raises:
    errors.UserError: if a file is missing or damaged, the method or an option
      is not supported, or the adapter belongs to another model.
  """
  place = folder / names_lib.CONFIG
  config = _read_config(place)
  name, row = names_lib.method_of(config, str(place))
  form = row.form if names_lib.OWN not in config else None
  block = _block(config, name, form, place)
  _check_depth(block, paths, place)
  named, metadata = _read_tensors(folder)
  replaced = metadata.get(names_lib.REPLACED)
  if form is not None and form.peft_type == "LORA":
    init = config.get("init_lora_weights", True)
    # PEFT's LoftQ quantises otherwise.
    if (init == "loftq" and replaced is None) or (
        init not in names_lib.PLAIN_INITS and not starts.derived(init)):
      raise _changed_base(config, place)
    named, config = fused_lib.split(
        named, config, fused or {}, paths, metadata,
        str(folder / names_lib.WEIGHTS))
    config |= json.loads(metadata.get(names_lib.BEGAN, "{}"))
    block = _block(config, name, form, place)
  tied = "lm_head" not in paths
  bare = {n.removeprefix(names_lib.PREFIX): x for n, x in named.items()}
  saved = whole.saved(bare, config, tied, str(place))
  outer, used = whole.rows(bare, config, tied, str(place))
  rest = {k: v for k, v in named.items()
          if k.removeprefix(names_lib.PREFIX) not in {*saved, *used}}
  parts = [] if form is None or form.parts is None else _parts(
      folder, form.parts(config), paths, shapes, fused, geometry)
  if parts:  # Whose ranks, scales and rates the config does not know.
    block = dataclasses.replace(block, **{
        field: max(getattr(part.config, field) for part in parts)
        for field in ("rank", "alpha", "dropout")})
  reader = _Reader(
      folder, row, block, paths, shapes, geometry, uncut, fused or {})
  if form is not None and form.adapters is not None:
    tree = reader.by_name(rest, form, parts)
  elif names_lib.BEGAN in metadata:
    rest, then = difference.halves(rest)
    tree = difference.rejoined(
        reader.by_module(rest, outer, form),
        reader.by_module(then, outer, form))
  else:
    tree = reader.by_module(rest, outer, form)
  block = dataclasses.replace(
      block, targets=reader.targets, trainable_token_indices=tuple(
          tokens_lib.embedding_index(base_lib.Adapters(outer=outer))))
  tree = jax.tree.map(jax.numpy.asarray, dataclasses.replace(
      tree, outer=outer | tree.outer))
  return Loaded(block, tree, config, metadata.get(names_lib.FINGERPRINT),
                replaced, saved)


def _parts(folder, named, paths, shapes, fused, geometry) -> list[Loaded]:
  """Adapters of the folders that one names, in it or where PEFT finds them.

  Args:
    folder: that names them.
    named: paths.
    paths, shapes, fused, geometry: see `read`.
  """
  found = []
  for path in named:
    place = folder / path
    if not (place / names_lib.CONFIG).exists():
      place = pathlib.Path(path)
    if not (place / names_lib.CONFIG).exists():
      raise errors.UserError(
          f"{folder / names_lib.CONFIG}: adapters names {path}, which is no "
          f"adapter's folder in {folder} or here; copy it there, or change "
          "the path")
    found.append(read(place, paths, shapes, fused, geometry, uncut=True))
    if found[-1].replaced is not None or found[-1].saved:
      raise errors.UserError(
          f"{place}: an adapter that replaces weights of the base, or trains "
          "modules whole, is no part of another; save it as a difference, or "
          "use another")
  return found


class _Reader:
  """From tensors to adapters, for one model."""

  def __init__(
      self, folder, row, block, paths, shapes, geometry, uncut, fused):
    self._file = folder / names_lib.WEIGHTS
    self._row, self._block = row, block
    self._paths = targets_lib.open_to(paths, row, block.method)
    self._shapes, self._geometry = shapes, geometry
    self._uncut, self._fused = uncut, fused
    self.targets: tuple[str, ...] | str = "auto"

  def by_name(self, named, form, parts) -> base_lib.Adapters:
    """Of a method whose tensors do not go by modules."""
    more = [] if form.parts is None else [
        [(part.config, part.adapters) for part in parts]]
    if parts:
      self.targets = tuple(dict.fromkeys(
          path for part in parts for path in part.config.targets))
    try:
      return form.adapters(named, self._block, self._geometry, *more)
    except (KeyError, TypeError, ValueError) as error:
      raise errors.UserError(
          f"{self._file}: {sorted(named)} is not what this method has for "
          f"this model ({error}); the adapter was made for another base"
      ) from None

  def by_module(self, named, outer, form) -> base_lib.Adapters:
    """Module by module, then what they share."""
    known = {p for group in self._paths.values() for p in group}
    common = {n.removeprefix(names_lib.SHARED): x for n, x in named.items()
              if not n.startswith(names_lib.PREFIX)
              and n.startswith(names_lib.SHARED)}
    if self._row.share is None and common:
      raise self._stranger(names_lib.SHARED + min(common), known)
    modules = self._modules(
        {k: v for k, v in named.items()
         if k.removeprefix(names_lib.SHARED) not in common}, known)
    if not modules and self._block.targets != "auto":
      modules = {path: {} for path in self._named()}
    adapted = {t: [modules.get(p) for p in group]
               for t, group in self._paths.items() if t not in outer}
    adapted = {t: present for t, present in adapted.items()
               if any(module is not None for module in present)}
    ranks = {target: [self._rank(m, p) for m, p in zip(
        present, self._paths[target], strict=True)]
             for target, present in adapted.items()}
    shared, of = None, method_lib.Modules(
        {t: self._shapes[t] for t in adapted}, max(map(max, ranks.values())),
        self._block.options, self._geometry, ranks, adapted)
    if self._row.share is not None:
      shared = self._shared(common, of, form)
    layers, found = self._stacks(of, shared)
    self.targets = tuple(
        p for t, g in self._paths.items() for p in g
        if p in modules and t in adapted)
    return base_lib.Adapters(layers=layers, outer=found, shared=shared)

  def _named(self) -> list[str]:
    """Modules that the config alone tells, where all values are shared."""
    try:
      chosen = targets_lib.select(
          self._paths, self._block.targets, self._block.layers)
    except errors.UsageError as error:  # Here it is a mistake in the file.
      raise errors.UserError(f"{self._file}: {error}") from None
    found = [p for target, flags in chosen.items()
             for p, flag in zip(self._paths[target], flags, strict=True)
             if flag]
    for whole_path, parts in self._fused.items():
      for path in parts:
        if path in found:
          raise errors.UserError(
              f"{self._file}: PEFT has this method on {whole_path} only, which "
              "is several modules here; merge the adapter with PEFT and use "
              "the merged model")
    return found

  def _shared(self, common, of, form):
    try:
      if form is None:
        like = self._row.share(jax.random.key(0), of)
        return type(like).from_peft(common, base_lib.Slot(
            rank=np.int32(1), scale=1.0, rate=0.0, options=of.options))
      return form.shared(common, self._block, of)
    except KeyError as error:
      raise errors.UserError(
          f"{self._file}: {names_lib.SHARED}{error.args[0]} is missing; save "
          "the adapter again, with what its modules share") from None

  def _stacks(self, of, shared):
    """(adapters of the layers, of what is outside of them) by target."""
    ranks, numbers, turns = of.ranks, of.numbers(), of.turns()
    inner = {t: r for t, r in ranks.items()
             if len(r) > 1 or ".layers." in self._paths[t][0]}
    ends: tuple[int, ...] = ()
    if inner:
      depth = len(next(iter(inner.values())))
      ends = (depth,) if self._uncut else assemble.cuts(
          self._row, inner, self._shapes)
    layers, outer = {}, {}
    for target, present in of.tensors.items():
      rows = list(zip(present, ranks[target], self._paths[target],
                      numbers[target], turns[target], strict=True))
      if target not in inner:
        outer[target], = self._stack(target, rows, shared, 0, 1)
        continue
      stacks = [self._stack(target, rows, shared, *span)
                for span in runs.spans(ends)]
      layers[target] = runs.joined([
          stack and jax.tree.map(lambda *x: np.stack(x), *stack)
          for stack in stacks], ends)
    return layers, outer

  def _stack(self, target, rows, shared, start, stop):
    """The adapters of a target in a run of layers, or None.

    Those not adapted do nothing.
    """
    block, row, found = self._block, self._row, []
    width = max(rank for _, rank, *_ in rows[start:stop])
    if not width:
      return None
    for module, rank, path, number, turn in rows[start:stop]:
      alpha = config_lib.by_pattern(path, block.alpha_pattern, block.alpha)
      slot = base_lib.Slot(
          rank=np.int32(rank),
          scale=np.float32(
              row.scale(alpha, rank, block.options) if rank else 0.0),
          rate=np.float32(block.dropout), number=number, turn=turn,
          target=target, width=width,
          shape=tuple(self._shapes[target]), options=block.options,
          start=starts.choose("default"), geometry=self._geometry)
      found.append(None if module is None else self._adapter(
          module, path, slot, shared))
    like = next(a for a in found if a is not None)
    return [like.inert() if a is None else a for a in found]

  def _rank(self, module, path) -> int:
    if module is None:
      return 0
    try:
      found = self._row.adapter.peft_rank(module)
    except (KeyError, IndexError) as error:
      raise errors.UserError(
          f"{self._file}: {path} has no {error.args[0]}; save the adapter "
          "again") from None
    if found is not None:
      return found
    block = self._block
    return config_lib.by_pattern(
        path, block.rank_pattern, block.rank) if self._row.ranked else 1

  def _adapter(self, module, path, slot, shared):
    self._fits(path, module, slot, shared)
    return self._kind(slot).from_peft(module, slot)

  def _kind(self, slot):
    return self._row.kind(slot) if self._row.kind else self._row.adapter

  def _fits(self, path, module, slot, shared):
    """Refuses tensors of other shapes than a new adapter of this model has."""
    own = dataclasses.replace(slot, width=int(slot.rank))
    weight = None if not slot.shape else jax.ShapeDtypeStruct(
        slot.shape, np.float32)

    def fresh(weight):
      return self._row.init(jax.random.key(0), weight, own, shared).bound(
          shared).to_peft(slot.embedding)

    expected = self._kind(slot).expected(module, own)
    if expected is None:
      expected = {
          k: v.shape for k, v in jax.eval_shape(fresh, weight).items()}
    got = {k: v.shape for k, v in module.items()}
    for suffix in sorted(expected.keys() | got.keys()):
      if expected.get(suffix) != got.get(suffix):
        raise errors.UserError(
            f"{self._file}: {path}.{suffix} has shape {got.get(suffix)}, this "
            f"model needs {expected.get(suffix)}; the adapter was made for "
            "another base")

  def _modules(self, named, known):
    """Tensors by module path and suffix; refuses modules of another model."""
    modules: dict[str, dict[str, np.ndarray]] = {}
    for name, value in named.items():
      path = name.removeprefix(names_lib.PREFIX)
      if self._is_copy(path, name, value):
        continue
      while path and path not in known:
        path = path.rpartition(".")[0]
      if not path or not name.startswith(names_lib.PREFIX):
        raise self._stranger(name, known)
      suffix = name[len(names_lib.PREFIX) + len(path) + 1:]
      modules.setdefault(path, {})[suffix] = value
    return modules

  def _is_copy(self, path, name, value) -> bool:
    """Whether a tensor is a frozen weight that PEFT saves as well."""
    for wrapper in WRAPPERS:
      path = path.replace(f"{wrapper}.", ".")
    if path not in COPIES:
      return False
    if value.shape != tuple(self._shapes["embed_tokens"]):
      raise errors.UserError(
          f"{self._file}: {name} has shape {value.shape}, this model needs "
          f"{tuple(self._shapes['embed_tokens'])}: the vocabulary was "
          "resized; give the same model.add_tokens, or merge the adapter with "
          "PEFT and use the merged model")
    return True

  def _stranger(self, name, known):
    stem = name.removeprefix(names_lib.PREFIX).split(".lora_")[0]
    return errors.UserError(
        f"{self._file}: tensor {name} belongs to no module of this "
        f"model{errors.nearest(stem, known)}; the adapter was made for another "
        "base")


def replication(folder: pathlib.Path) -> tuple[tuple[int, int], ...]:
  """`layer_replication` of a folder, for whose model `read` is."""
  place = folder / names_lib.CONFIG
  config = _read_config(place)
  name, row = names_lib.method_of(config, str(place))
  form = row.form if names_lib.OWN not in config else None
  return _block(config, name, form, place).layer_replication  # type: ignore


def _check_depth(block, paths, place) -> None:
  wanted = sum(stop - start for start, stop in depth_lib.ranges(
      block.layer_replication))
  depth = max(map(len, paths.values()))
  if wanted and wanted != depth:
    raise errors.UserError(
        f"{place}: layer_replication={block.layer_replication} makes a model "
        f"of {wanted} layers, this one has {depth}; the adapter was made for "
        "another base")


def _read_config(path) -> dict[str, Any]:
  if not path.exists():
    raise errors.UserError(
        f"{path} does not exist; give a folder saved by PEFT or by this code")
  try:
    config = json.loads(path.read_text())
    config.get("peft_type")
    return config
  except (ValueError, AttributeError) as error:
    raise errors.UserError(
        f"{path} is damaged or incomplete ({error}); save the adapter again"
    ) from None


def _block(
    config: Mapping[str, Any], name: str, form: method_lib.Form | None,
    path: pathlib.Path
) -> config_lib.AdapterConfig:
  """The adapter block that a config amounts to."""
  try:
    fields = (dict(config[names_lib.OWN]) if form is None
              else {"method": name} | form.block(config))
    for key, value in fields.items():
      fields[key] = tuple(value) if isinstance(value, list) else value
    return registry.checked(config_lib.AdapterConfig(**fields))
  except (KeyError, TypeError, ValueError) as error:
    raise errors.UserError(
        f"{path} is damaged or incomplete ({error}); save the adapter again"
    ) from None
  except errors.UsageError as error:  # Here it is a mistake in the file.
    raise errors.UserError(f"{path}: {error}") from None


def _changed_base(config, path) -> errors.UserError:
  return errors.UserError(
      f"{path}: init_lora_weights={config['init_lora_weights']!r} changed the "
      "base weights; convert the adapter with PEFT's "
      "path_initial_model_for_weight_conversion and load the result")


def _read_tensors(folder) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  path = folder / names_lib.WEIGHTS
  if not path.exists():
    pickled = folder / "adapter_model.bin"
    remedy = ("pickles are not read; save it again with safetensors"
              if pickled.exists() else "save the adapter again")
    raise errors.UserError(f"{path} does not exist; {remedy}")
  try:
    with safetensors.safe_open(path, framework="flax") as f:
      metadata = f.metadata() or {}
      names = f.keys()  # The file itself cannot be iterated over.
      named = {name: np.asarray(f.get_tensor(name)) for name in names}
  except (safetensors.SafetensorError, ValueError, OSError) as error:
    raise errors.UserError(
        f"{path} is damaged ({str(error).splitlines()[0]}); copy or save the "
        "adapter again") from None
  return named, metadata
