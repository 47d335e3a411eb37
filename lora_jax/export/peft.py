"""Hugging Face PEFT's adapter folders, both ways.

  adapter_config.json        what is adapted, at which rank and alpha
  adapter_model.safetensors  base_model.model.<module path>.lora_A.weight ...

Matrices are transposed to `[out, in]` there. What is read is decided by the
tensors: which modules, which ranks; the config decides the method and the
scale. A folder that asks for something this code does not do is refused:
loading the rest of it would compute another function.
"""

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
from lora_jax import mesh as mesh_lib
from lora_jax import processes
from lora_jax.adapters import base as base_lib
from lora_jax.adapters import config as config_lib
from lora_jax.adapters import registry
from lora_jax.adapters import tokens as tokens_lib
from lora_jax.export import difference
from lora_jax.export import folders
from lora_jax.export import fused as fused_lib
from lora_jax.export import tensors as tensors_lib
from lora_jax.export import whole
from lora_jax.models import hub

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Metadata key of the fingerprint of the base an adapter was trained on.
FINGERPRINT = "lora_jax.base"

# PEFT options that change what is computed, and the values that do not.
NEUTRAL: dict[str, tuple] = {
    "bias": ("none",), "fan_in_fan_out": (False,), "lora_bias": (False,),
    "layer_replication": (None,), "use_qalora": (False,),
    "target_parameters": (None, []), "alora_invocation_tokens": (None,),
    "use_bdlora": (None, False),
    "megatron_config": (None,), "arrow_config": (None,),
    "velora_config": (None,), "kasa_config": (None,),
    "monteclora_config": (None,),
}
# Of the base weights that the start of an adapter replaced; see `starts`.
REPLACED = "lora_jax.replaced"
# Initialisations after which the folder needs no other base weights.
PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")
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


def peft_config(
    config: config_lib.AdapterConfig,
    adapters: base_lib.Adapters,
    paths: Mapping[str, Sequence[str]],
    base_name: str | None = None,
) -> dict[str, Any]:
  """`adapter_config.json` for an adapter of ours.

  A target that is adapted in every layer is named by itself, one that is not
  by the full paths of its modules.
  """
  row = registry.method(config.method)
  names = []
  for target, ranks in _ranks(adapters).items():
    if all(ranks):
      names.append(target)
    else:
      names += [p for p, r in zip(paths[target], ranks, strict=True) if r]
  alpha = float(config.alpha)
  whole_names = whole.names(adapters.overrides)
  base, revision = hub.split(base_name or "") or (base_name, None)
  return {
      "peft_type": row.adapter.peft_type if row.adapter else None,
      "task_type": "CAUSAL_LM",
      "base_model_name_or_path": base,
      **({"revision": revision} if revision else {}),
      "inference_mode": True,
      "r": config.rank,
      "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
      "lora_dropout": float(config.dropout),
      "target_modules": sorted(names),
      "rank_pattern": dict(config.rank_pattern),
      "alpha_pattern": dict(config.alpha_pattern),
      "bias": "none",
      "fan_in_fan_out": False,
      "init_lora_weights": (
          True if config.init == "default" else config.init),
      "use_dora": False,
      "use_rslora": False,
      "modules_to_save": whole_names or None,
      "trainable_token_indices": whole.token_indices(adapters),
      "ensure_weight_tying": (
          "embed_tokens" in whole_names and "lm_head" not in paths),
  } | dict(row.peft_config) | difference.loftq(config)


def tensors(
    adapters: base_lib.Adapters, paths: Mapping[str, Sequence[str]]
) -> dict[str, np.ndarray]:
  """PEFT's tensors by name, float32."""
  found = {}
  host = jax.device_get(adapters)
  for target, ranks in _ranks(host).items():
    stacked = host.layers.get(target)
    for layer, rank in enumerate(ranks):
      if not rank:
        continue
      module = (host.outer[target] if stacked is None
                else jax.tree.map(lambda x, i=layer: x[i], stacked))
      embedding = target == "embed_tokens"
      for suffix, value in module.to_peft(embedding).items():
        name = f"{PREFIX}{paths[target][layer]}.{suffix}"
        found[name] = np.ascontiguousarray(value, np.float32)
  saved = whole.tensors(host, tied="lm_head" not in paths)
  return found | {f"{PREFIX}{name}": value for name, value in saved.items()}


def write(
    folder: pathlib.Path,
    adapters: base_lib.Adapters,
    config: Mapping[str, Any],
    paths: Mapping[str, Sequence[str]],
    fingerprint: str | None = None,
    fused: fused_lib.Fused | None = None,
    replaced: str | None = None,
    more: Mapping[str, np.ndarray] | None = None,
    tokenizer: Any = None,
) -> None:
  """Writes an adapter folder; a folder that is there is replaced whole.

  Args:
    folder: where.
    adapters: whole tree.
    config: `adapter_config.json`, from `peft_config` or `Loaded`.
    paths: module paths by target.
    fingerprint: of the base, kept in the file's metadata.
    fused: modules that transformers has in place of several of `paths`.
    replaced: see `Loaded`; kept there, too.
    more: tensors to write beside the adapters', e.g. `whole.tables`.
    tokenizer: saved beside them, if given.

  Raises:
    errors.UserError: if the method has no PEFT counterpart, or the disk is
      full or not writable.
  """
  if config["peft_type"] is None:
    raise errors.UserError(
        "this method has no counterpart in PEFT; use --format=hf")
  metadata = {"format": "pt"}
  if fingerprint:
    metadata[FINGERPRINT] = fingerprint
  if replaced:
    metadata[REPLACED] = replaced
  adapters = jax.tree.map(mesh_lib.fetch, adapters)
  if not processes.writes():
    return
  named, config, joined = fused_lib.join(
      tensors(adapters, paths), config, fused or {}, paths)
  metadata |= joined
  named |= {f"{PREFIX}{name}": x for name, x in (more or {}).items()}
  named = dict(sorted(named.items()))
  # Patterns keep their order: the first that matches a module counts.
  text = json.dumps(dict(sorted(config.items())), indent=2) + "\n"
  with folders.replaced(pathlib.Path(folder), CONFIG) as fresh:
    tensors_lib.write(
        fresh / WEIGHTS, {name: x.shape for name, x in named.items()},
        named.items(), "float32", metadata)
    (fresh / CONFIG).write_text(text, encoding="utf-8")
    if tokenizer is not None:
      tokenizer.save_pretrained(fresh)


def read(
    folder: pathlib.Path,
    paths: Mapping[str, Sequence[str]],
    shapes: Mapping[str, tuple[int, int]],
    fused: fused_lib.Fused | None = None,
) -> Loaded:
  """Reads an adapter folder for a model.

  Args:
    folder: holds `adapter_config.json` and `adapter_model.safetensors`.
    paths: module paths of the model by target.
    shapes: `(in, out)` of each target.
    fused: see `write`.

  Returns:
    The adapter.

  Raises:
    errors.UserError: if a file is missing or damaged, the method or an option
      is not supported, or the adapter belongs to another model.
  """
  config = _read_config(folder)
  method = _method(config, folder)
  named, metadata = _read_tensors(folder)
  replaced = metadata.get(REPLACED)
  if config.get("init_lora_weights") == "loftq" and replaced is None:
    raise _changed_base(config, folder)  # PEFT quantises otherwise.
  named, config = fused_lib.split(
      named, config, fused or {}, paths, metadata, str(folder / WEIGHTS))
  tied = "lm_head" not in paths
  bare = {name.removeprefix(PREFIX): x for name, x in named.items()}
  saved = whole.saved(bare, config, tied, str(folder / CONFIG))
  outer, found = whole.rows(bare, config, tied, str(folder / CONFIG))
  modules = _by_module(
      {k: v for k, v in named.items()
       if k.removeprefix(PREFIX) not in {*saved, *found}},
      paths, shapes, folder)
  row = registry.METHODS[method]
  assert row.adapter is not None  # `_method` chose among those with one.
  scale = registry.METHODS[
      "rslora" if config.get("use_rslora") else method].scale
  alphas = config.get("alpha_pattern") or {}
  layers = {}
  for target, group in paths.items():
    present = [modules.get(p) for p in group]
    if target in outer or not any(present):
      continue
    ranks = [_rank(m, p, shapes[target], folder, row)
             for m, p in zip(present, group)]
    stack = []
    for module, rank, path in zip(present, ranks, group):
      alpha = config_lib.by_pattern(path, alphas, config["lora_alpha"])
      frozen = {
          "rank": np.int32(rank),
          "scale": np.float32(scale(alpha, rank) if rank else 0.0),
          "rate": np.float32(config.get("lora_dropout") or 0.0)}
      stack.append(row.adapter.from_peft(
          module or _absent(row, shapes[target]), max(ranks), frozen))
    if target in OUTER:
      outer[target] = stack[0]
    else:
      layers[target] = jax.tree.map(lambda *x: np.stack(x), *stack)
  adapter_config = config_lib.AdapterConfig(
      method=method, rank=config["r"], alpha=config["lora_alpha"],
      dropout=float(config.get("lora_dropout") or 0.0),
      targets=tuple(p for t, g in paths.items() for p in g
                    if p in modules and t in {**layers, **outer}
                    and not isinstance(outer.get(t), tokens_lib.TokenRows)),
      trainable_token_indices=tuple(tokens_lib.embedding_index(
          base_lib.Adapters(outer=outer))),
      rank_pattern=config.get("rank_pattern") or {}, alpha_pattern=alphas,
      **difference.start(config))
  tree = jax.tree.map(
      jax.numpy.asarray, base_lib.Adapters(layers=layers, outer=outer))
  return Loaded(adapter_config, tree, config, metadata.get(FINGERPRINT),
                replaced, saved)


def _ranks(adapters) -> dict[str, list[int]]:
  both = {**adapters.layers, **adapters.outer}
  return {target: np.atleast_1d(np.asarray(a.rank)).tolist()
          for target, a in both.items() if hasattr(a, "rank")}


def _read_config(folder) -> dict[str, Any]:
  path = folder / CONFIG
  if not path.exists():
    raise errors.UserError(
        f"{path} does not exist; give a folder saved by PEFT or by this code")
  try:
    config = json.loads(path.read_text())
    return config | {"r": int(config["r"]),
                     "lora_alpha": config.get("lora_alpha", 8)}
  except (ValueError, KeyError, TypeError) as error:
    if isinstance(error, KeyError) and config.get("peft_type") != "LORA":
      return config | {"r": 0, "lora_alpha": 0}
    raise errors.UserError(
        f"{path} is damaged or incomplete ({error}); save the adapter again"
    ) from None


def _changed_base(config, folder) -> errors.UserError:
  return errors.UserError(
      f"{folder / CONFIG}: init_lora_weights={config['init_lora_weights']!r} "
      "changed the base weights; convert the adapter with PEFT's "
      "path_initial_model_for_weight_conversion and load the result")


def _method(config, folder) -> str:
  known = sorted({m.adapter.peft_type for m in registry.METHODS.values()
                  if m.adapter and m.adapter.peft_type})
  if config.get("peft_type") not in known:
    raise errors.UserError(
        f'{folder / CONFIG}: peft_type="{config.get("peft_type")}" is not '
        f"supported; supported: {', '.join(known)}")
  for name, values in NEUTRAL.items():
    if name in config and config[name] not in values:
      raise errors.UserError(
          f"{folder / CONFIG}: {name}={config[name]!r} is not supported; "
          "merge the adapter with PEFT and use the merged model")
  init = config.get("init_lora_weights", True)
  if init not in PLAIN_INITS and not difference.replaces(init):
    raise _changed_base(config, folder)
  if config.get("use_dora"):
    return "dora"
  return "rslora" if config.get("use_rslora") else "lora"


def _read_tensors(folder) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  path = folder / WEIGHTS
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


def _by_module(named, paths, shapes, folder):
  """Tensors by module path and suffix; refuses modules of another model."""
  known = {p for group in paths.values() for p in group}
  modules: dict[str, dict[str, np.ndarray]] = {}
  for name, value in named.items():
    path = name.removeprefix(PREFIX)
    plain = path
    for wrapper in WRAPPERS:
      plain = plain.replace(f"{wrapper}.", ".")
    if plain in COPIES:
      if value.shape != tuple(shapes["embed_tokens"]):
        raise errors.UserError(
            f"{folder / WEIGHTS}: {name} has shape {value.shape}, this model "
            f"needs {tuple(shapes['embed_tokens'])}: the vocabulary was "
            "resized; give the same model.add_tokens, or merge the adapter "
            "with PEFT and use the merged model")
      continue
    while path and path not in known:
      path = path.rpartition(".")[0]
    if not path or not name.startswith(PREFIX):
      stem = name.removeprefix(PREFIX)
      raise errors.UserError(
          f"{folder / WEIGHTS}: tensor {name} belongs to no module of this "
          f"model{errors.nearest(stem.split('.lora_')[0], known)}; the "
          "adapter was made for another base")
    suffix = name[len(PREFIX) + len(path) + 1:]
    modules.setdefault(path, {})[suffix] = value
  return modules


def _rank(module, path, shape, folder, row) -> int:
  """The rank of a module's tensors, after checking their shapes."""
  if module is None:
    return 0
  embedding = "lora_embedding_A" in module
  a = module.get("lora_embedding_A" if embedding else "lora_A.weight")
  if a is None or a.ndim != 2:
    raise errors.UserError(
        f"{folder / WEIGHTS}: {path} has no lora_A; save the adapter again")
  r = a.shape[0]
  like = row.adapter.from_peft(
      _absent(row, shape, r), r, {"rank": np.int32(r), "scale": 0, "rate": 0})
  expected = {k: v.shape for k, v in like.to_peft(embedding).items()}
  got = {k: v.shape for k, v in module.items()}
  for suffix in sorted(expected.keys() | got.keys()):
    if expected.get(suffix) != got.get(suffix):
      raise errors.UserError(
          f"{folder / WEIGHTS}: {path}.{suffix} has shape "
          f"{got.get(suffix)}, this model needs {expected.get(suffix)}; the "
          "adapter was made for another base")
  return r


def _absent(row, shape, r: int = 0) -> dict[str, np.ndarray]:
  """PEFT's tensors of a module that adapts nothing (or has rank r)."""
  i, o = shape
  return {"lora_A.weight": np.zeros((r, i), np.float32),
          "lora_B.weight": np.zeros((o, r), np.float32),
          "lora_magnitude_vector": np.ones(o, np.float32)}
