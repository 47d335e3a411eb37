"""A whole model as a Hugging Face folder, its adapters merged into it.

The merge is onto the *dequantised* base, the weights that the adapter was
trained beside: the result computes what was trained. Merging into the
original 16-bit weights instead leaves an error of 3 to 30 times the adapter's
own change, and quantising the merged weights again keeps 1 to 4% of it (both
measured for NF4), so that neither is offered.

Tensors are merged and written one at a time: beside the base, memory holds
one matrix.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator
import dataclasses
import functools
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax import host as host_lib
from lora_jax import mesh as mesh_lib
from lora_jax import processes
from lora_jax import quant
from lora_jax import types
from lora_jax.adapters import runs
from lora_jax.adapters import targets as targets_lib
from lora_jax.export import folders
from lora_jax.export import tensors as tensors_lib
from lora_jax.models import config as config_lib
from lora_jax.models import decoder
from lora_jax.models import hf

DTYPES = tensors_lib.DTYPES
METADATA = {"format": "pt"}


def merged(
    model: config_lib.ModelConfig,
    base: decoder.Base,
    adapters: adapters_lib.Adapters | None,
    dtype: str = "float32",
) -> tuple[config_lib.ModelConfig, Iterator[tuple[str, np.ndarray]]]:
  """The adapted model without adapters.

  Most adapters of a tied embedding or head change one of the two only, so the
  merged model then has both.

  Args:
    model: the architecture.
    base: its weights, quantised or not.
    adapters: what was trained, or None.
    dtype: a key of `DTYPES`.

  Returns:
    The architecture, and (Hugging Face's name, array in its `[o, i]` layout)
    in the order of `hf.names`, made one at a time.

  Raises:
    errors.UserError: if a weight is too large for `dtype`, or not finite
      (while iterating).
  """
  errors.choose("dtype", dtype, DTYPES)
  adapters = adapters or adapters_lib.Adapters()
  base = decoder.combined(base, adapters)
  model, base = _mergeable(model, base, adapters)
  if model.tie_embeddings and not all(
      adapters.outer[name].follows_tie for name in ("embed_tokens", "lm_head")
      if name in adapters.outer):
    model = dataclasses.replace(model, tie_embeddings=False)
    base = dataclasses.replace(
        base, lm_head=decoder.Linear(weight=base.embed_tokens.T))
  return model, _tensors(model, base, adapters, dtype)


def _mergeable(model, base, adapters):
  """The two, with the biases that adapters have where the base has none.

  Raises:
    errors.UserError: if an adapter is no change of weights.
  """
  layers: dict[str, Any] = dict(base.layers)
  for name, adapter in {**adapters.layers, **adapters.outer}.items():
    if name in targets_lib.SITES:
      raise errors.UserError(
          f"{type(adapter).__name__} stands beside the weights, and cannot be "
          "merged into them; use --format=peft")
    module = layers.get(name)
    if module is None or getattr(module, "bias", 0) is not None:
      continue
    stack, *_ = next(runs.each(adapter))
    gained = jax.eval_shape(
        jax.vmap(lambda a: a.bound(adapters.shared).shift(None)), stack)
    if gained is not None:
      layers[name] = dataclasses.replace(module, bias=_zeros(module))
  if all(layers[n] is base.layers[n] for n in layers):
    return model, base
  wanted = {n for n in layers if layers[n] is not base.layers[n]}
  try:
    model = model.with_biases(wanted)
  except ValueError as error:
    raise errors.UserError(
        f"{', '.join(sorted(wanted))} got a bias, which {error}; use "
        "--format=peft") from None
  # One flag stands for several modules, which all need one.
  for slot in hf.slots(model):
    module = layers.get(slot.target)
    if slot.leaf == "bias" and module is not None and module.bias is None:
      layers[slot.target] = dataclasses.replace(module, bias=_zeros(module))
  return model, dataclasses.replace(base, layers=layers)


def _zeros(module):
  """A bias for each of the base's stacked weights."""
  depth, _, outputs = module.weight.shape
  return jnp.zeros((depth, outputs))


def _tensors(model, base, adapters, dtype):
  for target, parts in hf.groups(model):
    pairs = [_pair(base, adapters, slot) for slot in parts]
    for layer in range(model.n_layers) if parts[0].stacked else (None,):
      name = hf.hf_name(layer, target, parts[0].leaf)
      values = []
      for slot, (leaf, adapter) in zip(parts, pairs, strict=True):
        where = None
        if layer is not None:
          adapter, row = runs.at(adapter, layer)
          where = model.stored(layer), row
        value, finite = _merge(
            leaf, adapter, adapters.shared, where, dtype=dtype,
            transpose=slot.linear, bias=slot.leaf == "bias")
        if not finite:
          raise errors.UserError(
              f"{name}: the merged weight is not finite in {dtype}; use "
              "--dtype=bfloat16 or float32, or an earlier checkpoint if it is "
              "not finite there either")
        values.append(mesh_lib.fetch(value))
      yield name, np.concatenate(values) if len(values) > 1 else values[0]


def _pair(base, adapters, slot):
  """A slot's leaf, and the adapter beside it or None."""
  holder = (base.layers[slot.target] if slot.stacked
            else getattr(base, slot.target))
  linear = isinstance(holder, decoder.Linear)
  where = adapters.layers if slot.stacked else adapters.outer
  return (getattr(holder, slot.leaf) if linear else holder,
          where.get(slot.target))


@functools.partial(jax.jit, static_argnames=("dtype", "transpose", "bias"))
def _merge(leaf, adapter, shared, where, *, dtype, transpose, bias):
  if where is not None:
    leaf, adapter = (adapters_lib.layer(tree, number) for tree, number in zip(
        (leaf, adapter), where))
  leaf = host_lib.on_device(leaf)
  if adapter is None:
    value = quant.dequantize(leaf, jnp.float32)
  else:
    adapter = adapter.bound(shared)
    value = adapter.shift(leaf) if bias else adapter.merge(leaf)
  value = value.astype(dtype)
  return value.T if transpose else value, jnp.isfinite(value).all()


def write(
    folder: pathlib.Path,
    model: config_lib.ModelConfig,
    base: decoder.Base,
    adapters: adapters_lib.Adapters | None = None,
    *,
    dtype: str = "float32",
    tokenizer: Any = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
  """Writes the merged model; a model folder that is there is replaced whole.

  Args:
    folder: where.
    model: the architecture.
    base: its weights, quantised or not.
    adapters: what was trained, or None.
    dtype: a key of `DTYPES`.
    tokenizer: saved beside the weights, if given.
    shard_bytes: size of a file, unless a single tensor is larger.

  Raises:
    errors.UserError: see `merged`; and if `folder` holds something else, or
      the disk is full or not writable.
  """
  model, tensors = merged(model, base, adapters, dtype)
  if not processes.writes():
    collections.deque(tensors, maxlen=0)  # Gathers the writer's tensors.
    return
  folder = pathlib.Path(folder)
  with folders.replaced(folder, "config.json") as fresh:
    _write_json(fresh / "config.json", model.to_hf() | {"dtype": dtype})
    _write_json(
        fresh / "generation_config.json", _generation(model, tokenizer))
    _write_weights(fresh, hf.names(model), tensors, dtype, shard_bytes)
    if tokenizer is not None:
      tokenizer.save_pretrained(fresh)


def _generation(model, tokenizer) -> dict[str, Any]:
  ends = list(model.eos_ids)
  if tokenizer is not None and tokenizer.eos_token_id is not None:
    ends = list(dict.fromkeys([*ends, tokenizer.eos_token_id]))
  values = {"bos_token_id": list(model.bos_ids), "eos_token_id": ends}
  found: dict[str, Any] = {
      k: v if len(v) > 1 else v[0] for k, v in values.items() if v}
  if tokenizer is not None and tokenizer.pad_token_id is not None:
    found["pad_token_id"] = tokenizer.pad_token_id
  return found


def plan(
    shapes: dict[str, tuple[int, ...]], itemsize: int, shard_bytes: int
) -> list[list[str]]:
  """Names of each shard's tensors, in order.

  Args:
    shapes: by name.
    itemsize: bytes of an element.
    shard_bytes: a shard holds no more, unless one tensor does.
  """
  shards: list[list[str]] = []
  room = 0
  for name, shape in shapes.items():
    size = itemsize * math.prod(shape)
    if not shards or size > room:
      shards.append([])
      room = shard_bytes
    shards[-1].append(name)
    room -= size
  return shards


def _write_weights(folder, shapes, tensors, dtype, shard_bytes) -> None:
  itemsize = jnp.dtype(dtype).itemsize
  # `hf.names` and the tensors have one order, that of `hf.groups`.
  shards = plan(shapes, itemsize, shard_bytes)
  where: dict[str, str] = {}
  for i, names in enumerate(shards, 1):
    file = ("model.safetensors" if len(shards) == 1
            else f"model-{i:05d}-of-{len(shards):05d}.safetensors")
    where |= dict.fromkeys(names, file)
    tensors_lib.write(
        folder / file, {n: shapes[n] for n in names}, tensors, dtype, METADATA)
  if len(shards) > 1:
    total = sum(itemsize * math.prod(s) for s in shapes.values())
    _write_json(folder / hf.INDEX, {
        "metadata": {"total_size": total}, "weight_map": where})


def _write_json(path: pathlib.Path, value: types.Tree) -> None:
  path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
