"""Converted bases that are kept, so that a second start need not convert.

  <root>/<fingerprint[:16]>-<key[:16]>/  a base (`base_store`); the key is a
                                         digest of all that it depends on
                                         beside the source's tensors
  <root>/index/<digest of paths>.json    a source's files as they were, and
                                         the fingerprint they had

A source whose files have the sizes and times of the index is not read again.
Whatever else was done to them is a miss: the source is converted, which
hashes it, and is found under its old key if only its times had changed. What
was made by other code (formats, conversion, reader) is made anew.

Only what `load.convert` gave is kept: a method that replaces base weights
does so afterwards, on its own arrays. `rm -r` of any part is safe.
"""

from __future__ import annotations

from collections.abc import Sequence
import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
import os
import pathlib
import shutil
import time
from typing import Any

from absl import logging
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lora_jax import errors
from lora_jax import quant
from lora_jax.models import base_arrays
from lora_jax.models import base_store
from lora_jax.models import base_tree
from lora_jax.models import hf
from lora_jax.models import init
from lora_jax.models import load as load_lib

# Smaller sources are converted in seconds, and are not kept unasked.
KEEP_BYTES = 2**30
INDEX = "index"
# Two changes within the coarsest clock of a file system (FAT) look like one.
SETTLED_S = 2.0


def load(
    source: load_lib.Source,
    spec: quant.QuantSpec | None = None,
    dtype: Any = jnp.float32,
    skip: Sequence[str] = load_lib.SKIP,
    *,
    root: pathlib.Path | None,
    mesh: Mesh | None = None,
    host: bool = False,
    keep_bytes: int | None = None,
) -> load_lib.LoadedBase:
  """`load.convert`, or what it gave before: the same bytes.

  A cache that cannot be written costs a warning, and so does a damaged entry,
  which is removed and made anew.

  Args:
    source: of `load.open_source`.
    spec, dtype, skip: see `load.load`.
    root: where bases are kept; None converts whatever is there.
    mesh: the devices to place the base on; the default device if None.
    host: whether the layers stay in host memory; see `load.convert`.
    keep_bytes: size from which on a source's base is kept; `KEEP_BYTES` if
      None.

  Raises:
    errors.UserError: see `load.convert`.
  """
  if isinstance(source, base_store.Stored):
    return restore(source.path, mesh, spec, dtype, skip, host)
  if root is None:
    return load_lib.convert(source, spec, dtype, skip, mesh, host)
  wanted = _Wanted.of(root, source, spec, dtype, skip)
  stored = _find(wanted)
  if stored is not None:
    try:
      base = stored.base(mesh, host)
    except base_store.Damaged as error:
      _remove(stored.path, error)
    else:
      return load_lib.LoadedBase(
          source.config, base, stored.fingerprint, source.label)
  if wanted.size < (KEEP_BYTES if keep_bytes is None else keep_bytes):
    return load_lib.convert(source, spec, dtype, skip, mesh, host)
  _settle(wanted)
  loaded = load_lib.convert(source, spec, dtype, skip, mesh, host)
  try:
    _keep(wanted, loaded)
  except (errors.UserError, OSError) as error:
    logging.warning("the converted base is not kept: %s", error)
  return loaded


def keep(
    source: load_lib.Source,
    spec: quant.QuantSpec | None = None,
    dtype: Any = jnp.float32,
    skip: Sequence[str] = load_lib.SKIP,
    *,
    root: pathlib.Path,
) -> base_store.Stored:
  """The entry that `load` will find, made if it is not there.

  Raises:
    errors.UserError: see `load.convert`; if it cannot be written.
  """
  wanted = _Wanted.of(root, source, spec, dtype, skip)
  stored = _find(wanted)
  if stored is not None:
    return stored
  _settle(wanted)
  return _keep(wanted, load_lib.convert(source, spec, dtype, skip))


def restore(
    folder: pathlib.Path,
    mesh: Mesh | None = None,
    spec: quant.QuantSpec | None = None,
    dtype: Any = None,
    skip: Sequence[str] = load_lib.SKIP,
    host: bool = False,
) -> load_lib.LoadedBase:
  """A base from its folder; each process reads what its devices hold.

  Args:
    folder: of `base_store.write`.
    mesh: the devices; the default device if None.
    spec, dtype, skip: how it must have been made; not checked if `dtype` is
      None.
    host: see `load`.

  Raises:
    base_store.Damaged: if it is not what was written.
    errors.UserError: if it was made otherwise.
  """
  stored = base_store.Stored.open(folder)
  base = (stored.base(mesh, host) if dtype is None
          else stored.converted(spec, dtype, skip, mesh, host))
  return load_lib.LoadedBase(
      stored.config, base, stored.fingerprint, str(folder))


def entries(root: pathlib.Path) -> list[base_store.Stored]:
  """What is kept, the latest used last; damaged ones are left out."""
  found = []
  for path in root.glob("*-*"):
    with contextlib.suppress(base_store.Damaged, OSError):
      found.append((path.stat().st_mtime, base_store.Stored.open(path)))
  return [stored for _, stored in sorted(found, key=lambda pair: pair[0])]


def clear(root: pathlib.Path) -> int:
  """Removes everything that is kept; returns the bytes that it had.

  Raises:
    errors.UserError: if it cannot be removed.
  """
  size = sum(p.stat().st_size for p in root.rglob("*") if p.is_file())
  try:
    if root.exists():
      shutil.rmtree(root)
  except OSError as error:
    raise errors.UserError(
        f"{error.filename}: {error.strerror}; mend its permissions") from None
  return size


@dataclasses.dataclass(frozen=True)
class _Wanted:
  """A base that is asked for.

  Attributes:
    root: where bases are kept.
    source: what it is made from.
    recipe: how.
    files: [path, bytes, mtime_ns, ctime_ns] of the source's, before they are
      read; the paths are those behind all links (in the hub's cache, the
      blobs').
    key: digest of all that it depends on beside the tensors.
    code: digest of the code that it depends on.
  """

  root: pathlib.Path
  source: Any
  recipe: base_store.Recipe
  files: list[list[Any]]
  key: str
  code: str

  @classmethod
  def of(cls, root, source, spec, dtype, skip) -> _Wanted:
    if spec is None and source.scheme is None:
      spec = quant.QuantSpec(format="none")  # The same, of plain floats.
    recipe = base_store.Recipe.of(spec, dtype, skip)
    # Those of quantised checkpoints say how the tensors are to be read.
    settings = {
        p.name: p.read_text(encoding="utf-8", errors="replace")
        for p in source.files if p.suffix == ".json"}
    key = _digest([
        base_store.LAYOUT, recipe.to_json(), repr(source.config),
        type(source).__qualname__, settings])
    return cls(root, source, recipe, _identity(source), key,
               _code(inspect.getfile(type(source))))

  @property
  def size(self) -> int:
    return sum(size for _, size, _, _ in self.files)

  @property
  def note(self) -> pathlib.Path:
    """The file of the index."""
    digest = _digest([path for path, *_ in self.files])
    return self.root / INDEX / f"{digest[:32]}.json"

  def folder(self, fingerprint: str) -> pathlib.Path:
    return self.root / f"{fingerprint[:16]}-{self.key[:16]}"

  def is_met_by(self, stored: base_store.Stored) -> bool:
    return (stored.manifest.get("key") == self.key
            and stored.manifest.get("code") == self.code)


def _digest(value: Any) -> str:
  text = json.dumps(value, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _identity(source) -> list[list[Any]]:
  found = []
  for path in sorted({p.resolve() for p in source.files}):
    stat = path.stat()
    found.append(
        [str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns])
  return found


@functools.cache
def _code(reader: str) -> str:
  modules = (load_lib, hf, init, base_store, base_tree, base_arrays)
  paths = {pathlib.Path(f) for f in (reader, *map(inspect.getfile, modules))}
  house = pathlib.Path(inspect.getfile(quant)).parents[1]
  for folder in ("quant", "kernels", "models/checkpoints"):
    paths |= set((house / folder).glob("*.py"))
  return _digest([
      hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(paths)])


def _settle(wanted: _Wanted) -> None:
  """Waits until a change of the files would change their times."""
  age = time.time() - max(mtime for _, _, mtime, _ in wanted.files) / 1e9
  if 0 <= age < SETTLED_S:
    time.sleep(SETTLED_S - age)


def _find(wanted: _Wanted) -> base_store.Stored | None:
  """The entry of an unchanged source, if there is one made by this code."""
  try:
    note = json.loads(wanted.note.read_text(encoding="utf-8"))
    if note["files"] != wanted.files:
      return None
    folder = wanted.folder(note["fingerprint"])
  except (OSError, ValueError, KeyError, TypeError):
    return None  # Not there, or unreadable: the source tells.
  stored = _opened(wanted, folder)
  if stored is not None:
    with contextlib.suppress(OSError):
      os.utime(folder)  # When it was last of use, for `entries`.
  return stored


def _opened(wanted, folder) -> base_store.Stored | None:
  if not folder.exists():
    return None
  try:
    stored = base_store.Stored.open(folder)
  except base_store.Damaged as error:
    _remove(folder, error)
    return None
  return stored if wanted.is_met_by(stored) else None


def _remove(folder, error) -> None:
  logging.warning(
      "a kept base is damaged, converting the source again: %s", error)
  shutil.rmtree(folder, ignore_errors=True)


def _keep(wanted: _Wanted, loaded: load_lib.LoadedBase) -> base_store.Stored:
  """Writes an entry whole, unless another process was faster."""
  if not all(x.is_fully_addressable for x in jax.tree.leaves(loaded.base)):
    raise errors.UserError(
        "it is spread over several processes; run experiments.quantize on one "
        "machine first")
  folder = wanted.folder(loaded.fingerprint)
  stored = _opened(wanted, folder)
  if stored is None:
    with base_store.fresh(wanted.root) as scratch:
      base_store.write(
          scratch, loaded.config, loaded.base, wanted.recipe,
          loaded.fingerprint, source=loaded.source, key=wanted.key,
          code=wanted.code)
      if _opened(wanted, folder) is None:  # Else another process was faster.
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
          scratch.rename(folder)
    stored = _opened(wanted, folder)
    if stored is None:
      raise errors.UserError(
          f"{folder} cannot be replaced; mend its permissions, or delete it")
  if _identity(wanted.source) == wanted.files:
    _note(wanted, loaded.fingerprint)
  return stored


def _note(wanted: _Wanted, fingerprint: str) -> None:
  path = wanted.note
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f"{path.name}.{os.getpid()}")
  temporary.write_text(json.dumps(
      {"fingerprint": fingerprint, "files": wanted.files}), encoding="utf-8")
  temporary.replace(path)
