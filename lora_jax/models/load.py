"""From a checkpoint to a base, one tensor at a time.

Each tensor is read, hashed, moved to the device, quantised there, and written
into its layer of a stacked buffer that was allocated once and is updated in
place (donated): the host never holds more than the result and two tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
import functools
import hashlib
import pathlib
from typing import Any, NamedTuple, Protocol

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import errors
from lora_jax import quant
from lora_jax import types
from lora_jax.models import config as config_lib
from lora_jax.models import decoder
from lora_jax.models import gguf
from lora_jax.models import hf
from lora_jax.models import hub
from lora_jax.models import init
from lora_jax.models.checkpoints import scheme as scheme_lib

SKIP = ("lm_head", "embed_tokens")
_FLOAT = quant.QuantSpec(format="none")


class LoadedBase(NamedTuple):
  """A frozen model.

  Attributes:
    config: its geometry.
    base: its weights.
    fingerprint: sha256 hex of the source's tensors, whatever they were
      quantised to here.
    source: the path that was given.
  """

  config: config_lib.ModelConfig
  base: decoder.Base
  fingerprint: str
  source: str


class Source(Protocol):
  """A checkpoint: `hf.Folder` or `gguf.File`."""

  config: config_lib.ModelConfig
  label: str
  scheme: scheme_lib.Scheme | None  # How it is quantised, if it is.
  tensors: dict[str, Any]

  def read(self, name: str) -> hf.Tensor:
    """One tensor by Hugging Face's name."""


def load(
    path: str,
    spec: quant.QuantSpec | None = None,
    dtype: Any = jnp.float32,
    skip: Sequence[str] = SKIP,
) -> LoadedBase:
  """Loads a model from a folder, a `.gguf` file, or the Hugging Face hub.

  Args:
    path: a folder with `config.json` and safetensors, a `.gguf` file, a
      folder with one, or a hub name such as `HuggingFaceTB/SmolLM2-135M` or
      `owner/name@revision`.
    spec: how to quantise the projections. None, or the format "none", leaves
      them in `dtype`. A checkpoint that is quantised keeps its own codes,
      whatever `spec` and `skip` say, but for the format "none", which
      dequantises them.
    dtype: of everything that is not quantised.
    skip: targets that are not quantised.

  Returns:
    The model, on the default device.

  Raises:
    errors.UserError: if a file is missing, cut short or malformed, a tensor
      is missing, unknown or of another shape, or the model is unsupported.
  """
  return convert(open_source(path), spec, dtype, skip)._replace(
      source=str(path))


def open_source(path: str) -> Source:
  """The checkpoint at `path`; see `load`."""
  place = pathlib.Path(path).expanduser()
  if not place.exists():
    place = hub.fetch(str(path))
  if place.is_file():
    if place.suffix != ".gguf":
      raise errors.UserError(
          f"model.path={path} is a {place.suffix or 'nameless'} file; give a "
          "folder with config.json, or a .gguf file")
    return gguf.File(place)
  files = sorted(place.glob("*.gguf"))
  if files and not (place / "config.json").exists():
    if len(files) > 1 and files != gguf.parts(files[0]):
      raise errors.UserError(
          f"model.path={path} holds {len(files)} GGUF files; name one of "
          f"them, e.g. {files[0].name}")
    return gguf.File(files[0])
  return hf.Folder(place)


def convert(
    source: Source,
    spec: quant.QuantSpec | None = None,
    dtype: Any = jnp.float32,
    skip: Sequence[str] = SKIP,
) -> LoadedBase:
  """Reads every tensor of a checkpoint once; see `load`."""
  config = source.config
  _check(source, spec, skip)
  if source.scheme and spec and spec.format != "none":
    if spec.format not in source.scheme.label:
      logging.warning(
          "%s keeps its own quantisation (%s); quant.format=%s does not apply",
          source.label, source.scheme.label, spec.format)
    spec = None
  digests: dict[str, str] = {}
  leaves: dict[tuple[str, str], types.Tree] = {}
  for slot in hf.slots(config):
    kept = not slot.linear or (slot.target in skip and not source.scheme)
    how = _FLOAT if kept else spec
    leaves[slot.target, slot.leaf] = _leaf(
        source, slot, how, jnp.dtype(dtype), digests)
  fingerprint = hashlib.sha256("\n".join(sorted(digests.values())).encode())
  base = init.assemble(config, leaves)
  return LoadedBase(config, base, fingerprint.hexdigest(), source.label)


def _leaf(source, slot, spec, dtype, digests) -> types.Tree:
  """One slot of the base, stacked if it is one a layer."""
  if not slot.stacked:
    return _one(source, None, slot, spec, dtype, digests)
  stack = None
  for layer in range(source.config.n_layers):
    one = _one(source, layer, slot, spec, dtype, digests)
    if stack is None:
      stack = jax.tree.map(
          lambda x: jnp.zeros((source.config.n_layers, *x.shape), x.dtype),
          one)
    elif not _stackable(stack, one):
      logging.warning(
          "%s: %s is quantised in some layers and otherwise, or not, in "
          "others; all of them are dequantised", source.label, slot.target)
      return _leaf(source, slot, _FLOAT, dtype, digests)
    # Waiting keeps the next tensor from being read while this one is held.
    stack = jax.block_until_ready(_put(stack, one, layer))
  return stack


def _one(source, layer, slot, spec, dtype, digests) -> types.Tree:
  """One weight, or one layer's, converted and on the device.

  Args:
    source: the checkpoint.
    layer: of a stacked slot; else None.
    slot: what to read.
    spec: how to quantise a float; the format "none" makes floats of codes,
      None leaves either as it is.
    dtype: of a float.
    digests: lines of the fingerprint by stored name, added to.
  """
  raw = _read(
      source, hf.hf_name(layer, slot.target, slot.leaf), slot, digests)
  return jax.block_until_ready(
      _convert(raw, spec=spec, dtype=dtype, transpose=slot.linear))


def _stackable(stack: types.Tree, one: types.Tree) -> bool:
  def form(tree, lead):
    return jax.tree.structure(tree), [
        (x.shape[lead:], x.dtype) for x in jax.tree.leaves(tree)]

  return form(stack, 1) == form(one, 0)


@functools.partial(jax.jit, static_argnames=("spec", "dtype", "transpose"))
def _convert(raw, *, spec, dtype, transpose):
  floats = spec is None or spec.format == "none"
  if isinstance(raw, quant.QuantizedArray):
    return raw.dequantize(dtype) if spec and floats else raw
  array = raw.T if transpose else raw
  return array.astype(dtype) if floats else quant.quantize(array, spec)


@functools.partial(jax.jit, donate_argnums=0)
def _put(stack, one, layer):
  return jax.tree.map(
      lambda whole, x: jax.lax.dynamic_update_index_in_dim(
          whole, x, layer, 0), stack, one)


def _read(source, name, slot, digests) -> types.Tree:
  """The tensor on the device, its digest noted."""
  tensor = source.read(name)
  if tensor.shape != slot.shape:
    raise errors.UserError(
        f"{source.label}: {name} has shape {list(tensor.shape)}, but the "
        f"config asks for {list(slot.shape)}; the two belong to different "
        "models")
  for stored, part in (tensor.parts or {name: tensor}).items():
    content = hashlib.sha256(part.raw).hexdigest()
    digests[stored] = (
        f"{stored} {part.dtype} {list(part.array.shape)} {content}")
  # Waiting lets the host's copy go before the conversion allocates.
  return jax.block_until_ready(jax.device_put(tensor.array))


def _check(source: Source, spec, skip) -> None:
  if spec is not None:
    quant.check(spec)
  known = [*hf.MODULES, *hf.OUTER]
  for target in skip:
    if target not in known:
      raise errors.UserError(
          f'quant.skip: "{target}" is unknown{errors.nearest(target, known)}')
  if spec is not None and "embed_tokens" not in skip:
    raise errors.UserError(
        "quant.skip lacks embed_tokens: a table that is looked up, not "
        "multiplied, is not quantised; add it")
  wanted = hf.names(source.config)
  for name in wanted:
    if name not in source.tensors:
      raise errors.UserError(
          f"{source.label}: tensor {name} is missing; the checkpoint is "
          "incomplete, or its config.json belongs to another model")
  for name in source.tensors:
    # Old Llama files store RoPE's frequencies, tied ones the head twice.
    ignored = name.endswith("rotary_emb.inv_freq") or (
        name == "lm_head.weight" and source.config.tie_embeddings)
    if name not in wanted and not ignored and not _no_bias(source, name):
      raise errors.UserError(
          f"{source.label}: tensor {name} is not of a "
          f"{source.config.family} model with this config; the checkpoint "
          "belongs to another one")


def _no_bias(source: Source, name: str) -> bool:
  """Whether it is the bias of zeros that AutoGPTQ gives every projection."""
  if source.scheme is None or not name.endswith(".bias"):
    return False
  array = source.read(name).array
  return isinstance(array, np.ndarray) and not array.any()
