"""Hugging Face folders: names of tensors, reading, and names for writing.

All families share Llama's module names; `slots` is the one table of what a
model holds, used to read, to check and to write. Some checkpoints hold
several projections as one tensor; `groups` says which.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
import dataclasses
import json
import operator
import pathlib
from typing import Any

import jax
import numpy as np

from lora_jax import errors
from lora_jax import host as host_lib
from lora_jax import mesh as mesh_lib
from lora_jax import quant
from lora_jax import types
from lora_jax.models import config as config_lib
from lora_jax.models import registry
from lora_jax.models.checkpoints import registry as checkpoints
from lora_jax.models.families import common

# Module path of each target within a layer.
MODULES: dict[str, str] = {
    "input_layernorm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "post_attention_layernorm": "post_attention_layernorm",
    "pre_feedforward_layernorm": "pre_feedforward_layernorm",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
    "post_feedforward_layernorm": "post_feedforward_layernorm",
}
# Where `config.fused`: name -> (module path, the targets whose rows it holds,
# one after the other).
FUSED: dict[str, tuple[str, tuple[str, ...]]] = {
    "qkv_proj": ("self_attn.qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "gate_up_proj": ("mlp.gate_up_proj", ("gate_proj", "up_proj")),
}
OUTER: dict[str, str] = {
    "embed_tokens": "model.embed_tokens",
    "norm": "model.norm",
    "lm_head": "lm_head",
}
# First parts of the names that a multimodal checkpoint has besides its text
# model's.
VISION = ("vision_tower.", "multi_modal_projector.")
DTYPES = ("F32", "BF16", "F16")
INDEX = "model.safetensors.index.json"
# What says how the tensors are to be read.
SETTINGS = ("config.json", INDEX, "quantize_config.json", "quant_config.json")


@dataclasses.dataclass(frozen=True)
class Slot:
  """One parameter of a model, or of each of its layers.

  Attributes:
    target: a key of `MODULES` or `OUTER`.
    leaf: "weight" or "bias".
    shape: in Hugging Face's file: `[o, i]` for projections.
    stacked: whether every layer has one.
    linear: whether it is a projection's weight.
  """

  target: str
  leaf: str
  shape: tuple[int, ...]
  stacked: bool = True
  linear: bool = False


def slots(config: config_lib.ModelConfig) -> list[Slot]:
  """Every parameter of a model, in the order of the forward pass."""
  d, f, v, e = (
      config.d_model, config.d_ff, config.vocab_size, config.head_dim)
  queries, keys = config.n_heads * e, config.n_kv_heads * e
  norms = {"input_layernorm": d, "post_attention_layernorm": d}
  if config.post_norms:
    norms |= {"pre_feedforward_layernorm": d, "post_feedforward_layernorm": d}
  if config.qk_norm:
    norms |= {"q_norm": e, "k_norm": e}
  linears = {
      "q_proj": (queries, d, config.qkv_bias),
      "k_proj": (keys, d, config.qkv_bias),
      "v_proj": (keys, d, config.qkv_bias),
      "o_proj": (d, queries, config.o_bias),
      "gate_proj": (f, d, config.mlp_bias),
      "up_proj": (f, d, config.mlp_bias),
      "down_proj": (d, f, config.mlp_bias),
  }
  found = [Slot("embed_tokens", "weight", (v, d), stacked=False)]
  for target in MODULES:
    if target in norms:
      found.append(Slot(target, "weight", (norms[target],)))
    if target in linears:
      o, i, bias = linears[target]
      found.append(Slot(target, "weight", (o, i), linear=True))
      if bias:
        found.append(Slot(target, "bias", (o,)))
  found.append(Slot("norm", "weight", (d,), stacked=False))
  if not config.tie_embeddings:
    found.append(
        Slot("lm_head", "weight", (v, d), stacked=False, linear=True))
  return found


def groups(
    config: config_lib.ModelConfig) -> list[tuple[str, tuple[Slot, ...]]]:
  """The slots by the tensor that a checkpoint keeps them in.

  Args:
    config: the model.

  Returns:
    (target, its slots), in the order of `slots`: a slot by itself under its
    own target, or those of a key of `FUSED`, whose tensor has their rows one
    after the other.
  """
  holder = {target: name for name, (_, targets) in FUSED.items()
            for target in targets} if config.fused else {}
  found: dict[tuple[str, str], tuple[Slot, ...]] = {}
  for slot in slots(config):
    key = (holder.get(slot.target, slot.target), slot.leaf)
    found[key] = (*found.get(key, ()), slot)
  return [(target, parts) for (target, _), parts in found.items()]


def rows(config: config_lib.ModelConfig, target: str) -> tuple[str, int, int]:
  """(tensor's target, first row, last + 1) of a projection's weight."""
  for name, parts in groups(config):
    stop = 0
    for slot in parts:
      start, stop = stop, stop + slot.shape[0]
      if slot.target == target and slot.leaf == "weight":
        return name, start, stop
  raise KeyError(target)


def fused_modules(
    config: config_lib.ModelConfig) -> dict[str, dict[str, int]]:
  """Outputs of the projections in each fused module, by path.

  `{"model.layers.0.self_attn.qkv_proj": {"model.layers.0.self_attn.q_proj":
  3072, ...}, ...}`; empty unless `config.fused`.
  """
  return {
      hf_name(layer, target, ""): {
          hf_name(layer, slot.target, ""): slot.shape[0] for slot in parts}
      for target, parts in groups(config) if target in FUSED
      for layer in range(config.n_layers)}


def hf_name(layer: int | None, target: str, leaf: str = "weight") -> str:
  """`(3, "q_proj") -> "model.layers.3.self_attn.q_proj.weight"`.

  Args:
    layer: index, or None for `embed_tokens`, `norm` and `lm_head`.
    target: a key of `MODULES`, `FUSED`, or of `OUTER`.
    leaf: "weight" or "bias"; "" gives the module's path.
  """
  if layer is None:
    module = OUTER[target]
  else:
    path = FUSED[target][0] if target in FUSED else MODULES[target]
    module = f"model.layers.{layer}.{path}"
  return f"{module}.{leaf}" if leaf else module


def names(config: config_lib.ModelConfig) -> dict[str, tuple[int, ...]]:
  """Shape of every tensor of a model's checkpoint, by Hugging Face's name."""
  return {
      hf_name(layer, target, parts[0].leaf): joined_shape(parts)
      for target, parts in groups(config)
      for layer in (range(config.n_layers) if parts[0].stacked else (None,))}


def joined_shape(parts: tuple[Slot, ...]) -> tuple[int, ...]:
  """Shape of a group's tensor in Hugging Face's file."""
  return (sum(slot.shape[0] for slot in parts), *parts[0].shape[1:])


def state(
    config: config_lib.ModelConfig, base: types.Tree, dtype: Any
) -> Iterator[tuple[str, np.ndarray]]:
  """A base's tensors under Hugging Face's names and shapes, one at a time.

  Args:
    config: the model.
    base: a `decoder.Base`; quantised weights are dequantised.
    dtype: of the tensors given.

  Yields:
    (name, array) in the order of `names`.
  """
  for target, parts in groups(config):
    for layer in range(config.n_layers) if parts[0].stacked else (None,):
      stored = None if layer is None else config.stored(layer)
      arrays = [_plain(base, slot, stored, dtype) for slot in parts]
      yield hf_name(layer, target, parts[0].leaf), (
          np.concatenate(arrays) if len(arrays) > 1 else arrays[0])


def _plain(base, slot: Slot, layer: int | None, dtype) -> np.ndarray:
  holder = (base.layers[slot.target] if slot.stacked
            else getattr(base, slot.target))
  leaf = getattr(holder, slot.leaf) if hasattr(holder, slot.leaf) else holder
  if layer is not None:
    leaf = host_lib.on_device(jax.tree.map(operator.itemgetter(layer), leaf))
  array = mesh_lib.fetch(quant.dequantize(leaf, dtype))
  return np.ascontiguousarray(array.T) if slot.linear else array


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor as a checkpoint holds it.

  Attributes:
    dtype: the file's name of its type.
    raw: its bytes in the file, uint8 `[n]`.
    array: its value, `[o, i]` or `[o]`, in a float type; or `[i, o]` with
      numpy leaves, if the checkpoint is quantised.
    parts: what it was put together from, by name; empty if it is stored as
      one tensor.
  """

  dtype: str
  raw: np.ndarray
  array: np.ndarray | quant.QuantizedArray
  parts: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the value in Hugging Face's layout: `[o, i]` or `[o]`."""
    shape = self.array.shape
    return shape[::-1] if isinstance(
        self.array, quant.QuantizedArray) else shape


class Folder:
  """A folder with `config.json` and `model.safetensors`, or its shards.

  Attributes:
    config: the model's.
    label: what messages call it.
    scheme: how its weights are quantised, or None.
    tensors: by the name in a model of text alone, what each is put together
      from: such names by suffix; a plain tensor's is its own.
    files: all that is read.
  """

  def __init__(self, path: pathlib.Path):
    """Reads the config and the index.

    Raises:
      errors.UserError: if a file is missing or malformed.
    """
    self.label = str(path)
    file = path / "config.json"
    content = _json(file)
    quantised = content.pop("quantization_config", None)
    legacy = path / "quantize_config.json"  # AutoGPTQ, before transformers.
    if not quantised and legacy.exists():
      file, quantised = legacy, {"quant_method": "gptq"} | _json(legacy)
    self.config = _with_ends(
        registry.from_hf(content, str(path / "config.json")), path)
    self.scheme = (
        checkpoints.open_scheme(quantised, str(file)) if quantised else None)
    files = _index(path)
    names = (text_names(files) if "text_config" in content
             else dict(zip(files, files, strict=True)))
    self._files = {name: (files[old], old) for name, old in names.items()}
    parts = self.scheme.parts(self._files) if self.scheme else {}
    hidden = {name for stored in parts.values() for name in stored.values()}
    self.tensors = {name: {"": name} for name in self._files
                    if name not in hidden} | parts
    self.files = [
        *(path / name for name in SETTINGS if (path / name).exists()),
        *sorted({file for file, _ in self._files.values()})]

  def read(self, name: str) -> Tensor:
    """One tensor; the file is open, and mapped, for this call only.

    Raises:
      errors.UserError: if it cannot be read, or is not of a float type.
    """
    stored = self.tensors[name]
    if "" in stored or self.scheme is None:
      return self._stored(name, DTYPES)
    parts = {suffix: self._stored(part) for suffix, part in stored.items()}
    try:
      array = self.scheme.decode(
          {suffix: part.array for suffix, part in parts.items()})
    except errors.UserError as error:
      raise errors.UserError(f"{self.label}: {name}: {error}") from None
    if isinstance(array, np.ndarray):
      array = array.T
    return Tensor(self.scheme.label, np.empty(0, np.uint8), array, {
        stored[suffix]: part for suffix, part in parts.items()})

  def _stored(self, name: str, dtypes: Collection[str] | None = None):
    import safetensors

    file, name = self._files[name]
    try:
      with safetensors.safe_open(file, framework="np") as handle:
        if name not in set(handle.keys()):
          raise errors.UserError(
              f"{file}: {name} is missing, though {INDEX} says it is there; "
              "download the file again")
        dtype = handle.get_slice(name).get_dtype()
        if dtypes is not None and dtype not in dtypes:
          raise errors.UserError(
              f"{file}: {name} is of type {dtype}; supported: "
              f"{', '.join(dtypes)}")
        array = handle.get_tensor(name)
    except (OSError, safetensors.SafetensorError) as error:
      raise errors.UserError(_broken(file, error)) from None
    return Tensor(dtype, array.reshape(-1).view(np.uint8), array)


def _with_ends(config, path: pathlib.Path) -> config_lib.ModelConfig:
  """With the end tokens that only `generation_config.json` names.

  Of chat models, some say there alone what ends a turn (Phi-3's `<|end|>`).
  """
  file = path / "generation_config.json"
  if not file.exists():
    return config
  ends = common.token_ids(_json(file), eos=None)["eos_ids"]
  return dataclasses.replace(
      config, eos_ids=tuple(dict.fromkeys(config.eos_ids + ends)))


def text_names(names: Iterable[str]) -> dict[str, str]:
  """Names of a multimodal checkpoint's tensors by those of its text model.

  `{"model.norm.weight": "language_model.model.norm.weight", ...}`; those of
  the vision tower and its projector are left out.
  """
  found = {}
  for name in names:
    bare = name.removeprefix("model.")
    if bare.startswith(VISION):
      continue
    text = name
    if bare.startswith("language_model."):
      text = bare.removeprefix("language_model.")
      if not text.startswith(("model.", "lm_head.")):
        text = f"model.{text}"
    found[text] = name
  return found


def _index(path: pathlib.Path) -> dict[str, pathlib.Path]:
  import safetensors

  index = path / INDEX
  if index.exists():
    where = _json(index).get("weight_map")
    if not isinstance(where, dict):
      raise errors.UserError(
          f"{index}: weight_map is missing; download the file again")
    found = {name: path / shard for name, shard in where.items()}
    for file in sorted(set(found.values())):
      if not file.exists():
        raise errors.UserError(
            f"{file} is missing, though {INDEX} names it; download it again")
    return found
  file = path / "model.safetensors"
  if not file.exists():
    raise errors.UserError(
        f"{path} holds neither model.safetensors nor {INDEX}; give a folder "
        "in safetensors format (transformers converts .bin files: "
        "from_pretrained, then save_pretrained)")
  try:
    with safetensors.safe_open(file, framework="np") as handle:
      return dict.fromkeys(handle.keys(), file)
  except (OSError, safetensors.SafetensorError) as error:
    raise errors.UserError(_broken(file, error)) from None


def _broken(file: pathlib.Path, error: Exception) -> str:
  reason = str(error).splitlines()[0]
  return f"{file} is cut short or corrupt ({reason}); download it again"


def _json(file: pathlib.Path) -> dict[str, Any]:
  try:
    content = json.loads(file.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise errors.UserError(
        f"{file} is missing; give a model folder with config.json") from None
  except (OSError, ValueError) as error:
    raise errors.UserError(
        f"{file} cannot be read as JSON ({error}); download it again"
    ) from None
  if not isinstance(content, dict):
    raise errors.UserError(
        f"{file} holds a {type(content).__name__}; a JSON object is needed")
  return content
