"""A model with several methods, taken apart into models with one each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
from typing import Any, TYPE_CHECKING

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax import processes
from lora_jax.adapters import hybrid
from lora_jax.adapters import registry
from lora_jax.adapters import several
from lora_jax.export import folders
from lora_jax.export import hybrid as hybrid_export
from lora_jax.models import sharding

if TYPE_CHECKING:
  from lora_jax.api import model as model_lib

# Where `Model.save_merged` leaves what it does not merge.
REST = "adapter"


@dataclasses.dataclass(frozen=True)
class Part:
  """One of several methods of a model.

  Attributes:
    config: what its adapters were made from.
    peft_config: its `adapter_config.json`, if it was read.
  """

  config: adapters_lib.AdapterConfig
  peft_config: dict[str, Any] | None = None


def configs(
    given: hybrid.Configs, new_tokens: Sequence[int]
) -> dict[str, adapters_lib.AdapterConfig]:
  """Configs by the names of their parts; "" is the name of one alone.

  Args:
    given: see `Model.adapt`.
    new_tokens: ids of what the first calls new.

  Raises:
    errors.UsageError: see `hybrid.by_name`; and if there are no new tokens.
  """
  found = ({"": given} if isinstance(given, adapters_lib.AdapterConfig)
           else hybrid.by_name(given))
  name, one = next(iter(found.items()))
  if one.trainable_token_indices == "new":
    if not new_tokens:
      raise errors.UsageError(
          'adapter.trainable_token_indices="new", but model.add_tokens names '
          "none; give ids, or name tokens there")
    found[name] = dataclasses.replace(
        one, trainable_token_indices=tuple(new_tokens))
  return found


def with_ids(
    config: adapters_lib.AdapterConfig, tokenizer: Any, source: str
) -> adapters_lib.AdapterConfig:
  """With the ids of a text that virtual tokens start as, where there is one."""
  config = registry.checked(config)
  if not getattr(config.options, "text", "") or config.options.ids:
    return config
  ids = tuple(tokenizer(config.options.text)["input_ids"])
  return dataclasses.replace(config, options=dataclasses.replace(
      config.options, ids=ids, tokenizer=source))


def replication(configs: Mapping[str, adapters_lib.AdapterConfig]) -> Any:
  """`adapter.layer_replication`, of a model with one method.

  Raises:
    errors.UsageError: if one of several parts asks for it.
  """
  found = [c.layer_replication for c in configs.values() if c.layer_replication]
  if found and len(configs) > 1:
    raise errors.UsageError(
        f"adapter.layer_replication={found[0]}: a model with several methods "
        "keeps its layers; leave it empty, or use one method")
  return found[0] if found else next(iter(configs.values())).layer_replication


def taken(
    tree: adapters_lib.Adapters, parts: Mapping[str, Part]
) -> dict[str, tuple[Any, Any]]:
  """By place, the A and B that a start took out of the base's weights.

  Of several parts only the first can have done so.
  """
  names = list(parts)
  own = several.apart(tree, names)[names[0]] if names else tree
  return adapters_lib.starts.taken(own)


def apart(model: model_lib.Model) -> dict[str, model_lib.Model]:
  """The same model with each of its parts alone, by name.

  What the base has of the first, or gained beside adapters, is the first's.
  """
  names = list(model.parts)
  trees = several.apart(model.adapters, names)

  def one(name, part):
    alone = dataclasses.replace(
        model, parts={}, adapters=trees[name], adapter_config=part.config,
        peft_config=part.peft_config)
    return alone if name == names[0] else dataclasses.replace(
        alone, replaced=None, resized=False, new_tokens=())

  return {name: one(name, part) for name, part in model.parts.items()}


def joined(models: Mapping[str, model_lib.Model]) -> model_lib.Model:
  """Inverse of `apart`: on the first's base, the innermost first."""
  whole = next(iter(models.values()))
  tree = several.joined({n: one.adapters for n, one in models.items()})
  tree = adapters_lib.beside(tree, whole.base)
  return dataclasses.replace(
      whole, peft_config=None,
      adapters=tree if whole.mesh is None else sharding.put(whole.mesh, tree),
      parts={name: Part(one.adapter_config, one.peft_config)
             for name, one in models.items()})


def save(
    model: model_lib.Model, folder: pathlib.Path, difference: bool) -> None:
  """Every part in a folder of its own; see `export.hybrid`."""
  models = apart(model)
  if not processes.writes():
    for name, one in models.items():  # Gathers the writer's tensors.
      one.save(folder / name, difference=difference)
    return
  with folders.replaced(folder, hybrid_export.FILE) as fresh:
    for name, one in models.items():
      one.save(fresh / name, difference=difference)
    hybrid_export.write(fresh, list(models))


def read(
    model: model_lib.Model, folder: pathlib.Path, names: Sequence[str],
    dropout: float | None
) -> model_lib.Model:
  """A model with the parts of a folder; see `Model.with_adapter`.

  Raises:
    errors.UserError: if a part cannot be read, or one that is not the first
      needs another base or trains modules whole.
  """
  found = {}
  for name in names:
    found[name] = one = model.with_adapter(
        folder / name, dropout=dropout, uncut=True)
    config = one.adapter_config
    if len(found) > 1 and (
        one.replaced is not None or config.modules_to_save
        or config.trainable_token_indices):
      raise errors.UserError(
          f"{folder / name}: a part that replaces weights of the base, or "
          "trains modules whole, has to be the first; put it first in "
          f"{folder / hybrid_export.FILE}")
  return joined(found)


def mergeable(model: model_lib.Model) -> tuple[str, ...]:
  """The parts that can be merged and leave the others what they compute."""
  found: list[str] = []
  kept: list[str] = []
  for name, part in model.parts.items():
    merges = registry.method(part.config.method).mergeable and (
        several.before(model.adapters, name, kept) is None)
    (found if merges else kept).append(name)
  return tuple(found)


def split(
    model: model_lib.Model, names: Sequence[str] | None
) -> tuple[model_lib.Model, model_lib.Model | None]:
  """(with these parts alone, with the others beside what those merge to).

  The second has this model's base still: only its adapters are of use.

  Args:
    model: of several parts; or of one, if `names` is None.
    names: of the parts; None is all.

  Raises:
    errors.UserError: if they cannot be merged while the others are kept.
  """
  if names is None:
    names = list(model.parts)
    if not names:
      return model, None
  if not names or not model.parts:
    raise errors.UserError(
        f"parts={','.join(names)}: there is nothing to merge; parts that can "
        f"be: {', '.join(mergeable(model)) or 'none'}")
  for name in names:
    errors.choose("parts", name, dict(model.parts))
    if not registry.method(model.parts[name].config.method).mergeable:
      raise errors.UserError(
          f"{name} stands beside the weights, and cannot be merged into them; "
          f"those that can: {', '.join(mergeable(model)) or 'none'}")
  kept = [name for name in model.parts if name not in names]
  if model.replaced is not None and next(iter(model.parts)) in kept:
    raise errors.UserError(
        f"parts={','.join(names)}: {next(iter(model.parts))} has replaced "
        "weights of the base; merge it, too")
  for name in names:
    found = several.before(model.adapters, name, kept)
    if found is not None:
      target, other = found
      raise errors.UserError(
          f"parts={','.join(names)}: {name} acts on what {other} has made of "
          f"{target}; merge {other}, too")
  if not kept:
    return model, None
  models = apart(model)
  rest = dataclasses.replace(
      joined({name: models[name] for name in kept}), fingerprint="",
      replaced=None)
  return joined({name: models[name] for name in names}), rest
