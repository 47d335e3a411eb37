"""From a checkpoint to a base, one tensor at a time.

Each tensor is read, hashed, moved to a device, quantised there, and written
into its layer of a stacked buffer that was allocated once and is updated in
place (donated): the host never holds more than the result and two tensors.

On a mesh the buffers are allocated in parts and each tensor is scattered into
them; no device ever holds a whole stack. A tensor is quantised before it is
cut, so that its codes do not depend on the mesh. Every process reads (and
hashes) the whole checkpoint and keeps the parts of its own devices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
import hashlib
import itertools
import pathlib
from typing import Any, NamedTuple, Protocol

from absl import logging
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from lora_jax import errors
from lora_jax import host as host_lib
from lora_jax import mesh as mesh_lib
from lora_jax import quant
from lora_jax import trees
from lora_jax import types
from lora_jax.models import base_store
from lora_jax.models import config as config_lib
from lora_jax.models import decoder
from lora_jax.models import gguf
from lora_jax.models import hf
from lora_jax.models import hub
from lora_jax.models import init
from lora_jax.models import sharding
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
  """A checkpoint: `hf.Folder`, `gguf.File`, `base_store.Stored`, or one that
  is drawn, `scratch.Scratch`."""

  @property
  def config(self) -> config_lib.ModelConfig:
    """The model's."""

  @property
  def label(self) -> str:
    """What messages call it."""

  @property
  def scheme(self) -> scheme_lib.Scheme | None:
    """How it is quantised, if it is."""

  @property
  def tensors(self) -> dict[str, Any]:
    """By Hugging Face's names."""

  @property
  def files(self) -> Sequence[pathlib.Path]:
    """All that decides what `read` gives."""

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
      folder with one, a folder that experiments.quantize wrote, or a hub name
      such as `HuggingFaceTB/SmolLM2-135M` or `owner/name@revision`.
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
  if (place / base_store.MANIFEST).exists():
    return base_store.Stored.open(place)
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
    mesh: Mesh | None = None,
    host: bool = False,
) -> LoadedBase:
  """Reads every tensor of a checkpoint once; see `load`.

  Args:
    source, spec, dtype, skip: as there.
    mesh: the devices to spread over; None is the default device.
    host: whether the matrices of layers are put together, and stay, in host
      memory; see `host_lib.placed`.
  """
  if isinstance(source, base_store.Stored):
    return LoadedBase(
        source.config, source.converted(spec, dtype, skip, mesh, host),
        source.fingerprint, source.label)
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
  for target, parts in hf.groups(config):
    hows = [
        _FLOAT if not slot.linear or (
            slot.target in skip and not source.scheme) else spec
        for slot in parts]
    found = _group(
        source, target, parts, hows, jnp.dtype(dtype), digests, mesh, host)
    leaves |= {(slot.target, slot.leaf): leaf
               for slot, leaf in zip(parts, found, strict=True)}
  fingerprint = hashlib.sha256("\n".join(sorted(digests.values())).encode())
  base = init.assemble(config, leaves)
  return LoadedBase(config, base, fingerprint.hexdigest(), source.label)


def originals(
    path: str | Source, place: Callable[[Any], jax.Array] = jnp.asarray
) -> Callable[[str, int | None], jax.Array]:
  """Reads weights again, as they are before quantisation.

  Args:
    path: see `load`; or the checkpoint, opened.
    place: puts a tensor on the devices.

  Returns:
    `(target, layer or None) -> [i, o]` float32 on the device, for
    projections; a checkpoint is opened at the first call.

  Raises:
    errors.UserError: as `load`, and for a checkpoint that is itself quantised;
      on the calls.
  """
  opened: list[Source] = []

  def read(target: str, layer: int | None) -> jax.Array:
    if not opened:
      opened.append(open_source(str(path)) if isinstance(
          path, str | pathlib.Path) else path)
    source = opened[0]
    if source.scheme is not None or isinstance(source, base_store.Stored):
      raise errors.UserError(
          f"{path} holds quantised weights, and adapter.init needs those they "
          "were made from; give the original model, or adapter.init=default")
    name, start, stop = hf.rows(source.config, target)
    raw = source.read(hf.hf_name(layer, name)).array
    return _convert(
        place(raw), spec=None, dtype=jnp.dtype("float32"), transpose=True,
        rows=(start, stop))

  return read


def _group(source, target, parts, specs, dtype, digests, mesh, host
           ) -> list[types.Tree]:
  """The slots of one tensor (a layer), stacked if there is one a layer.

  Args:
    source: the checkpoint.
    target: of the tensor.
    parts: the slots whose rows it holds.
    specs: how to quantise each; the format "none" makes floats of codes, None
      leaves floats and codes as they are.
    dtype: of floats.
    digests: lines of the fingerprint by stored name, added to.
    mesh: the devices, or None for one.
    host: see `convert`.
  """
  read = functools.partial(
      _ones, source, target, parts, specs, dtype, digests)
  if not parts[0].stacked:
    return jax.block_until_ready(_scattered(mesh, parts, read(None)))
  depth = source.config.n_layers
  stacks: types.Tree = None
  for layer in range(depth):
    ones = read(layer)
    if stacks is None:
      stacks = _allocated(mesh, parts, ones, depth, host)
    elif not _stackable(stacks, ones):
      logging.warning(
          "%s: %s is quantised in some layers and otherwise, or not, in "
          "others; all of them are dequantised", source.label, target)
      floats = [_FLOAT] * len(parts)
      return _group(source, target, parts, floats, dtype, digests, mesh, host)
    # Waiting keeps the next tensor from being read while this one is held.
    stacks = jax.block_until_ready(_filled(mesh, parts, stacks, ones, layer))
  return _pinned(mesh, parts, stacks)


def _stackable(stacks: types.Tree, ones: types.Tree) -> bool:
  def form(tree, lead):
    return jax.tree.structure(tree), [
        (x.shape[lead:], x.dtype) for x in jax.tree.leaves(tree)]

  return form(stacks, 1) == form(ones, 0)


def _ones(source, target, parts, specs, dtype, digests, layer
          ) -> list[types.Tree]:
  """The slots of one tensor, whole, on one device of this process."""
  ends = list(itertools.accumulate(slot.shape[0] for slot in parts))
  raw = _read(source, hf.hf_name(layer, target, parts[0].leaf),
              hf.joined_shape(parts), digests)
  # Waiting lets the raw tensor go before the stack is made or copied.
  return jax.block_until_ready([
      _convert(raw, spec=spec, dtype=dtype, transpose=slot.linear,
               rows=(end - slot.shape[0], end))
      for slot, spec, end in zip(parts, specs, ends, strict=True)])


def _scattered(mesh, parts, ones) -> list[types.Tree]:
  """The tensors cut into their parts."""
  if mesh is None:
    return ones
  return jax.tree.map(mesh_lib.place, ones, _homes(mesh, parts, ones))


def _allocated(mesh, parts, ones, depth, host) -> list[types.Tree]:
  """Zeros for `depth` tensors like these, in parts from the start; arrays of
  numpy for what is to be in host memory."""
  stacks = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct((depth, *x.shape), x.dtype), ones)
  if host:
    far = jax.tree.map(lambda x: None if host_lib.stays(x) else np.empty(
        x.shape, x.dtype), stacks)
    near = jax.tree.map(
        lambda one, x: one if host_lib.stays(x) else None, ones, stacks)
    return trees.combine(far, _allocated(mesh, parts, near, depth, False))
  zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), stacks)
  if mesh is None:
    return zeros()
  return jax.jit(zeros, out_shardings=_homes(mesh, parts, stacks))()


def _filled(mesh, parts, stacks, ones, layer) -> list[types.Tree]:
  """The stacks with a layer written, in place."""
  in_numpy = lambda x: isinstance(x, np.ndarray)
  near = jax.tree.map(lambda s: None if in_numpy(s) else s, stacks)
  far = jax.tree.map(lambda s: s if in_numpy(s) else None, stacks)
  for stack, one in zip(*map(jax.tree.leaves, (far, _like(far, ones)))):
    stack[layer] = mesh_lib.fetch(one)
  ones = _scattered(mesh, parts, _like(near, ones))
  return trees.combine(far, _put(near, ones, layer))


def _like(partial, ones) -> types.Tree:
  """Those of `ones` that are in a partial tree of stacks."""
  return jax.tree.map(
      lambda stack, one: None if stack is None else one, partial, ones,
      is_leaf=lambda x: x is None)


def _pinned(mesh, parts, stacks) -> list[types.Tree]:
  """With stacks that were filled in numpy moved to host memory, in parts."""

  def place(x, where):
    return mesh_lib.place(x, host_lib.home(where)) if isinstance(
        x, np.ndarray) else x

  homes = (jax.tree.map(lambda x: host_lib.default(), stacks) if mesh is None
           else _homes(mesh, parts, stacks))
  return jax.tree.map(place, stacks, homes)


def _homes(mesh, parts, trees) -> list[types.Tree]:
  """Where the leaves of slots' values, or stacks of values, live."""
  def one(slot, tree):
    logical: tuple[str, ...] = ("in", "out") if len(slot.shape) == 2 else ()
    if slot.leaf == "bias":
      logical = ("out",)
    return sharding.shardings(mesh, tree, target=slot.target, axes=logical)

  return [one(slot, tree) for slot, tree in zip(parts, trees, strict=True)]


@functools.partial(
    jax.jit, static_argnames=("spec", "dtype", "transpose", "rows"))
def _convert(raw, *, spec, dtype, transpose, rows):
  floats = spec is None or spec.format == "none"
  if isinstance(raw, quant.QuantizedArray):
    one = raw if rows == (0, raw.out_features) else raw.columns(*rows)
    return one.dequantize(dtype) if spec and floats else one
  array = raw[slice(*rows)]
  array = array.T if transpose else array
  return array.astype(dtype) if floats else quant.quantize(array, spec)


@functools.partial(jax.jit, donate_argnums=0)
def _put(stack, one, layer):
  return jax.tree.map(
      lambda whole, x: jax.lax.dynamic_update_index_in_dim(
          whole, x, layer, 0), stack, one)


def _read(source, name, wanted, digests) -> types.Tree:
  """The tensor on the device, its digest noted."""
  tensor = source.read(name)
  if tensor.shape != wanted:
    raise errors.UserError(
        f"{source.label}: {name} has shape {list(tensor.shape)}, but the "
        f"config asks for {list(wanted)}; the two belong to different models")
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
