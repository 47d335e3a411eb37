"""A converted base as a folder, so that the next start only reads it.

  manifest.json  the model, how it was quantised, the source's fingerprint,
                 the tree and the size of every file; a digest of itself
  arrays/        the leaves (`base_arrays`)
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import secrets
import shutil
import time
import typing
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lora_jax import errors
from lora_jax import host as host_lib
from lora_jax import quant
from lora_jax import trees
from lora_jax import types
from lora_jax.models import base_arrays
from lora_jax.models import base_tree
from lora_jax.models import config as config_lib
from lora_jax.models import decoder

LAYOUT = "lora_jax quantised base, layout 1"
MANIFEST = "manifest.json"
ARRAYS = "arrays"


class Damaged(errors.UserError):
  """A stored base that is not what was written."""


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How a source becomes a base; two equal ones give equal bytes.

  Attributes:
    spec: the format of the projections; its other fields are the defaults if
      it is "none". None is as they come.
    dtype: of what is not quantised.
    skip: sorted targets that are not quantised; none if nothing is.
  """

  spec: quant.QuantSpec | None
  dtype: str
  skip: tuple[str, ...]

  @classmethod
  def of(cls, spec: quant.QuantSpec | None, dtype: Any, skip) -> Recipe:
    """From the arguments of `load.convert`."""
    name = jnp.dtype(dtype).name
    if spec is None:
      return cls(None, name, ())
    if spec.format == "none":
      return cls(quant.QuantSpec(format="none"), name, ())
    return cls(spec, name, tuple(sorted(set(skip))))

  def to_json(self) -> dict[str, Any]:
    return {"quant": self.spec and dataclasses.asdict(self.spec),
            "dtype": self.dtype, "skip": list(self.skip)}

  def __str__(self) -> str:
    if self.spec is None:
      return f"it came, {self.dtype}"
    if self.spec.format == "none":
      return f"none {self.dtype}"
    return (f"{self.spec.format} block_size={self.spec.block_size} "
            f"double={self.spec.double} dtype={self.dtype} "
            f"skip={','.join(self.skip)}")


@dataclasses.dataclass(frozen=True)
class Stored:
  """A folder that `write` made; `load.Source` for `open_source`.

  Attributes:
    path: the folder.
    manifest: its manifest, checked.
    config: the model's.
    recipe: how it was made.
    fingerprint: of the source it was made from.
  """

  path: pathlib.Path
  manifest: dict[str, Any]
  config: config_lib.ModelConfig
  recipe: Recipe
  fingerprint: str

  @classmethod
  def open(cls, path: pathlib.Path) -> Stored:
    """Reads the manifest, and the sizes of the files it names.

    Raises:
      Damaged: if something is missing, cut short or altered.
    """
    manifest = _manifest(path)
    for name, size in manifest["files"].items():
      try:
        found = (path / name).stat().st_size
      except OSError as error:
        raise Damaged(f"{path / name}: {error.strerror}") from None
      if found != size:
        raise Damaged(f"{path / name} has {found:,} bytes, not {size:,}")
    try:
      given = manifest["quant"]
      spec = None if given is None else quant.QuantSpec(**given)
      recipe = Recipe.of(spec, manifest["dtype"], manifest["skip"])
      config = _decoded(config_lib.ModelConfig, manifest["config"])
    except (KeyError, TypeError, ValueError) as error:
      raise Damaged(
          f"{path / MANIFEST} is of another version of lora_jax ({error})"
      ) from None
    return cls(path, manifest, config, recipe, manifest["fingerprint"])

  @property
  def label(self) -> str:
    return str(self.path)

  @property
  def files(self) -> list[pathlib.Path]:
    return [self.path / MANIFEST]

  @property
  def tensors(self) -> dict[str, Any]:
    return {}

  @property
  def scheme(self) -> None:
    return None

  def read(self, name: str):
    raise Damaged(f"{self.path} holds a converted base, and no {name}")

  def base(
      self, mesh: Mesh | None = None, host: bool = False) -> decoder.Base:
    """The base, each process reading only what its devices hold.

    Args:
      mesh: the devices; the default device if it is None.
      host: see `base_arrays.read`.

    Raises:
      Damaged: if a chunk is missing or is not what was written.
    """
    template = base_tree.template(self.manifest["tree"])
    try:
      return base_arrays.read(self.path / ARRAYS, template, mesh, host)
    except base_arrays.Failure as error:
      raise Damaged(f"{self.path}: {error}") from None

  def converted(
      self, spec: quant.QuantSpec | None, dtype: Any, skip,
      mesh: Mesh | None = None, host: bool = False) -> decoder.Base:
    """The base, if it is what these arguments of `load.convert` ask for.

    One that is stored in float32 is rounded to another `dtype`, which gives
    what a conversion to that type gives.

    Raises:
      errors.UserError: if it was quantised otherwise.
    """
    asked = Recipe.of(spec, dtype, skip)
    if spec is None:
      asked = dataclasses.replace(self.recipe, dtype=asked.dtype)
    rounded = dataclasses.replace(self.recipe, dtype=asked.dtype)
    if asked != self.recipe and (
        asked != rounded or self.recipe.dtype != "float32"):
      raise errors.UserError(
          f"model.path={self.path} is stored as {self.recipe}, not as {asked}; "
          "ask for that, or convert the original again (experiments.quantize)")
    base = self.base(mesh, host)
    if asked == self.recipe:
      return base
    return jax.tree.map(
        lambda x: x if isinstance(x, quant.QuantizedArray)
        else jax.device_put(
            host_lib.on_device(x).astype(asked.dtype), x.sharding),
        base, is_leaf=lambda x: isinstance(x, quant.QuantizedArray))


def write(
    folder: pathlib.Path,
    config: config_lib.ModelConfig,
    base: types.Tree,
    recipe: Recipe,
    fingerprint: str,
    **more: Any,
) -> None:
  """Writes a base into an empty folder, the manifest last.

  Args:
    folder: exists, and is on the disk where the base is to be.
    config: the model.
    base: a `decoder.Base` whose arrays this process can read whole.
    recipe: how it was made.
    fingerprint: of the source.
    **more: JSON values for the manifest.

  Raises:
    errors.UserError: if it does not fit on the disk, or cannot be written.
  """
  tree = base_tree.describe(base)
  needed, free = trees.nbytes(base), shutil.disk_usage(folder).free
  try:
    if needed > free:
      raise base_arrays.Failure(
          f"{needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free")
    start = time.perf_counter()
    base_arrays.write(folder / ARRAYS, base)
    seconds = time.perf_counter() - start
    files = {
        str(p.relative_to(folder)): p.stat().st_size
        for p in sorted((folder / ARRAYS).rglob("*")) if p.is_file()}
    content = {
        "layout": LAYOUT, "fingerprint": fingerprint, **recipe.to_json(),
        "config": dataclasses.asdict(config), "tree": tree, "bytes": needed,
        "write_seconds": seconds, "files": files, **more}
    with open(folder / MANIFEST, "w", encoding="utf-8") as file:
      json.dump(content | {"sha256": _digest(content)}, file, indent=1)
      file.flush()
      os.fsync(file.fileno())
  except (base_arrays.Failure, OSError) as error:
    raise errors.UserError(
        f"{folder.parent}: the base cannot be written ({error}); free space, "
        "mend its permissions, or choose another folder") from None


@contextlib.contextmanager
def fresh(parent: pathlib.Path) -> Iterator[pathlib.Path]:
  """A new folder in `parent`, to be filled and renamed; else it is removed.

  Raises:
    errors.UserError: if it cannot be made.
  """
  path = parent / f".unfinished-{os.getpid()}-{secrets.token_hex(4)}"
  try:
    path.mkdir(parents=True)
  except OSError as error:
    raise errors.UserError(
        f"{parent}: {error.strerror or error}; mend its permissions, or choose "
        "another folder") from None
  try:
    yield path
  finally:
    shutil.rmtree(path, ignore_errors=True)


def _manifest(path: pathlib.Path) -> dict[str, Any]:
  file = path / MANIFEST
  try:
    content = json.loads(file.read_text(encoding="utf-8"))
    digest = content.pop("sha256")
  except (OSError, ValueError, KeyError, AttributeError) as error:
    raise Damaged(f"{file} cannot be read ({error!r})") from None
  if _digest(content) != digest:
    raise Damaged(f"{file} was altered: its sha256 does not match")
  if content["layout"] != LAYOUT:
    raise Damaged(f'{file}: layout "{content["layout"]}" is not "{LAYOUT}"')
  return content


def _digest(content: dict[str, Any]) -> str:
  text = json.dumps(content, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _decoded(cls: Any, values: dict[str, Any]) -> Any:
  """The inverse of `dataclasses.asdict` after JSON, for tuples and nesting."""
  hints = typing.get_type_hints(cls)
  unknown = values.keys() - {f.name for f in dataclasses.fields(cls)}
  if unknown:
    raise TypeError(f"unknown field {min(unknown)}")
  found = {}
  for name, value in values.items():
    kinds = (hints[name], *typing.get_args(hints[name]))
    nested = [k for k in kinds if dataclasses.is_dataclass(k)]
    found[name] = (
        _decoded(nested[0], value) if nested and isinstance(value, dict)
        else _tuples(value))
  return cls(**found)


def _tuples(value: Any) -> Any:
  return tuple(map(_tuples, value)) if isinstance(value, list) else value
