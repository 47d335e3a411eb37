"""Kept bases: equal to a conversion, found only where they are one."""

from __future__ import annotations

import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from lora_jax import errors
from lora_jax import quant
from lora_jax.models import base_cache
from lora_jax.models import base_store
from lora_jax.models import hf
from lora_jax.models import init
from lora_jax.models import load
from tests.models import tiny

CONFIG = tiny.CONFIGS["qwen3"]
SPEC = quant.QuantSpec(block_size=8)
ROOT = pathlib.Path(__file__).parents[2]


def write(folder, edit=None):
  """A Hugging Face folder of a random model, an hour old."""
  folder.mkdir(exist_ok=True)
  tensors = dict(hf.state(CONFIG, BASE, "float32"))
  if edit:
    edit(tensors)
  (folder / "config.json").write_text(json.dumps(CONFIG.to_hf()))
  safetensors.numpy.save_file(tensors, folder / "model.safetensors")
  age(folder)
  return folder


def age(folder):
  for path in folder.iterdir():
    then = path.stat().st_mtime_ns - 3600 * 10**9
    os.utime(path, ns=(then, then))


BASE = init.random_base(jax.random.key(3), CONFIG)


@pytest.fixture
def model(tmp_path):
  return write(tmp_path / "model")


@pytest.fixture
def root(tmp_path):
  return tmp_path / "bases"


@pytest.fixture
def reads(monkeypatch):
  """Names of the tensors that were read of a source, growing."""
  found = []
  read = hf.Folder.read
  monkeypatch.setattr(hf.Folder, "read", lambda self, name: (
      found.append(name), read(self, name))[1])
  return found


def start(model, root, spec=SPEC, keep_bytes=0, **options):
  return base_cache.load(load.open_source(model), spec, root=root,
                         keep_bytes=keep_bytes, **options)


def folders(root):
  return sorted(root.glob("*-*"))


def assert_equal(ours, theirs):
  assert jax.tree.structure(ours.base) == jax.tree.structure(theirs.base)
  assert ours._replace(base=None) == theirs._replace(base=None)
  for x, y in zip(jax.tree.leaves(ours.base), jax.tree.leaves(theirs.base),
                  strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("spec, dtype", [
    (SPEC, "float32"), (quant.QuantSpec("int4_affine", 4, False), "bfloat16")])
def test_a_second_start_reads_no_tensor_and_has_the_same_bytes(
    model, root, reads, spec, dtype):
  fresh = load.load(str(model), spec, dtype)
  first = start(model, root, spec, dtype=dtype)
  assert set(reads) == set(hf.names(CONFIG))
  reads.clear()
  second = start(model, root, spec, dtype=dtype)
  assert not reads
  assert_equal(first, fresh)
  assert_equal(second, fresh)
  assert_equal(base_cache.restore(folders(root)[0]), fresh._replace(
      source=str(folders(root)[0])))


def test_each_option_has_a_base_of_its_own(model, root, reads):
  options = [
      dict(spec=SPEC), dict(spec=quant.QuantSpec("fp4", 8)), dict(spec=None),
      dict(spec=SPEC, dtype=jnp.bfloat16),
      dict(spec=SPEC, skip=("embed_tokens",)),
      dict(spec=SPEC, skip=("embed_tokens", "lm_head", "q_proj"))]
  for one in options:
    start(model, root, **one)
  assert len(folders(root)) == len(options)
  reads.clear()
  for one in options:
    fresh = load.convert(load.open_source(model), **one)
    before = len(reads)
    assert_equal(start(model, root, **one), fresh)
    assert len(reads) == before
  # Two ways to say the same.
  start(model, root, spec=SPEC, skip=("embed_tokens", "lm_head"))
  start(model, root, spec=quant.QuantSpec("none", 4, False))
  assert len(folders(root)) == len(options)


def test_keys_differ_in_every_field_of_the_format(model, root):
  source = load.open_source(model)
  specs = [quant.QuantSpec(f, size, double) for f in quant.FORMATS
           for size in (4, 8) for double in (True, False)]
  keys = {base_cache._Wanted.of(root, source, s, "float32", load.SKIP).key
          for s in specs}
  assert len(keys) == len(specs)


def test_a_changed_source_is_another_base(model, root, reads):
  first = start(model, root)

  def nudge(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1e-3

  size = (model / "model.safetensors").stat().st_size
  times = {p: p.stat() for p in model.iterdir()}
  write(model, nudge)
  # The same sizes and modification times: ctime tells.
  for path, then in times.items():
    os.utime(path, ns=(then.st_atime_ns, then.st_mtime_ns))
  assert (model / "model.safetensors").stat().st_size == size
  reads.clear()
  second = start(model, root)
  assert reads and second.fingerprint != first.fingerprint
  assert len(folders(root)) == 2
  # Tensors put back under new times: hashed again, and the old base is kept.
  written = folders(root)[0].stat().st_ino
  write(model)
  assert_equal(start(model, root), first)
  assert len(folders(root)) == 2
  assert folders(root)[0].stat().st_ino == written
  reads.clear()
  assert_equal(start(model, root), first)
  assert not reads
  # A config that reads the same tensors otherwise.
  other = CONFIG.to_hf() | {"rms_norm_eps": 0.5}
  (model / "config.json").write_text(json.dumps(other))
  age(model)
  third = start(model, root)
  assert third.config.norm_eps == 0.5 and len(folders(root)) == 3
  assert third.fingerprint == first.fingerprint


def test_a_copy_shares_the_base_of_its_original(model, root, reads):
  start(model, root)
  copy = model.with_name("copy")
  shutil.copytree(model, copy)
  reads.clear()
  assert start(copy, root).source == str(copy)
  assert reads and len(folders(root)) == 1


def test_a_source_that_was_just_written_is_waited_for(
    model, root, monkeypatch):
  slept = []
  monkeypatch.setattr(base_cache.time, "sleep", slept.append)
  os.utime(model / "model.safetensors")
  start(model, root)
  assert len(slept) == 1 and 0 < slept[0] <= base_cache.SETTLED_S


def test_a_source_that_changes_while_it_is_read_is_not_noted(
    model, root, monkeypatch, reads):
  convert = load.convert

  def slow(*args):
    loaded = convert(*args)
    os.utime(model / "model.safetensors")
    return loaded

  monkeypatch.setattr(load, "convert", slow)
  start(model, root)
  age(model)
  reads.clear()
  start(model, root)
  assert reads


def test_other_code_makes_the_base_anew(model, root, reads, monkeypatch):
  start(model, root)
  made = folders(root)
  ino = made[0].stat().st_ino
  monkeypatch.setattr(base_cache, "_code", lambda reader: "another")
  reads.clear()
  start(model, root)
  assert reads and folders(root) == made and made[0].stat().st_ino != ino


def test_small_sources_are_not_kept_unasked(model, root, reads):
  start(model, root, keep_bytes=base_cache.KEEP_BYTES)
  assert not root.exists()
  stored = base_cache.keep(load.open_source(model), SPEC, root=root)
  assert stored.path == folders(root)[0]
  reads.clear()
  start(model, root, keep_bytes=base_cache.KEEP_BYTES)
  assert base_cache.keep(load.open_source(model), SPEC, root=root) == stored
  assert not reads
  start(model, None)
  assert reads


def largest(folder):
  return max((p for p in (folder / "arrays").rglob("*") if p.is_file()),
             key=lambda p: p.stat().st_size)


def flip(path, at):
  data = bytearray(path.read_bytes())
  data[at if at >= 0 else len(data) + at] ^= 4
  path.write_bytes(data)


DAMAGE = {
    "truncated": lambda f: os.truncate(
        largest(f), largest(f).stat().st_size - 1),
    "value flipped": lambda f: flip(largest(f), 40),
    "file missing": lambda f: largest(f).unlink(),
    "database flipped": lambda f: flip(f / "arrays/manifest.ocdbt", -9),
    "database missing": lambda f: (f / "arrays/manifest.ocdbt").unlink(),
    "manifest flipped": lambda f: flip(f / "manifest.json", 60),
    "manifest cut": lambda f: os.truncate(f / "manifest.json", 100),
    "manifest missing": lambda f: (f / "manifest.json").unlink(),
    "layout": lambda f: relabel(f, layout="another"),
}


def relabel(folder, **fields):
  """Another content of the manifest, its digest right."""
  content = json.loads((folder / "manifest.json").read_text()) | fields
  del content["sha256"]
  digest = base_store._digest(content)
  (folder / "manifest.json").write_text(
      json.dumps(content | {"sha256": digest}))


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_seen_reported_and_mended(
    model, root, reads, caplog, damage):
  fresh = start(model, root)
  folder = folders(root)[0]
  DAMAGE[damage](folder)
  reads.clear()
  assert_equal(start(model, root), fresh)
  assert reads
  warnings = [r.getMessage() for r in caplog.records]
  assert len(warnings) == 1 and "\n" not in warnings[0]
  assert str(folder) in warnings[0] and "damaged" in warnings[0]
  reads.clear()
  assert_equal(start(model, root), fresh)
  assert not reads and len(caplog.records) == 1


def test_every_byte_that_holds_a_value_is_checked(model, root):
  start(model, root)
  folder = folders(root)[0]
  fresh = base_cache.restore(folder)
  seen = 0
  for path in sorted((folder / "arrays").rglob("*")):
    size = path.stat().st_size
    for at in range(0, size if path.is_file() else 0, max(size // 3, 1)):
      flip(path, at)
      try:
        found = base_cache.restore(folder)
      except base_store.Damaged:
        seen += 1
      else:  # Bytes of a superseded node, or of what is not read.
        assert_equal(found, fresh)
      flip(path, at)
  assert seen > 20
  assert_equal(base_cache.restore(folder), fresh)


def test_damaged_notes_are_misses(model, root, reads):
  fresh = start(model, root)
  note, = (root / "index").iterdir()
  for text in ("", "{", "[]", '{"files": 1}', "null"):
    note.write_text(text)
    reads.clear()
    assert_equal(start(model, root), fresh)
    assert reads
    reads.clear()
    start(model, root)
    assert not reads


def test_a_cache_that_cannot_be_written_is_a_warning(
    model, tmp_path, caplog, monkeypatch):
  place = tmp_path / "file"
  place.write_text("")
  fresh = load.convert(load.open_source(model), SPEC)
  assert_equal(start(model, place), fresh)
  assert "not kept" in caplog.records[-1].getMessage()
  full = tmp_path / "full"
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
  try:
    assert_equal(start(model, full), fresh)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert "not kept" in caplog.records[-1].getMessage()
  assert not list(full.iterdir())
  monkeypatch.setattr(
      shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 9))
  assert_equal(start(model, full), fresh)
  message = caplog.records[-1].getMessage()
  assert "not kept" in message and "0.00 GB are free" in message
  assert not list(full.iterdir()) and len(caplog.records) == 3
  with pytest.raises(errors.UserError, match="free space"):
    base_cache.keep(load.open_source(model), SPEC, root=full)


def test_what_is_made_of_a_base_is_not_kept(model, root):
  """A method may replace base weights: on its own arrays, afterwards."""
  first = start(model, root)
  changed = first.base.replace(norm=first.base.norm * 2)
  assert_equal(start(model, root), first)
  assert not np.array_equal(changed.norm, start(model, root).base.norm)
  assert len(folders(root)) == 1


def test_entries_and_clear(model, root):
  assert base_cache.entries(root) == [] and base_cache.clear(root) == 0
  start(model, root)
  start(model, root, spec=None)
  os.utime(folders(root)[0], (1, 1))
  assert base_cache.entries(root)[0].path == folders(root)[0]
  assert base_cache.clear(root) > 0 and not root.exists()


_START = """
import pathlib, sys, time
from lora_jax import quant
from lora_jax.models import base_cache, load
model, root, gate = sys.argv[1:]
source = load.open_source(model)
write = base_cache.base_store.write
def meet(*args, **more):
  write(*args, **more)
  pathlib.Path(gate, str(time.monotonic_ns())).touch()
  while len(list(pathlib.Path(gate).iterdir())) < 2:
    time.sleep(0.01)
base_cache.base_store.write = meet
loaded = base_cache.load(source, quant.QuantSpec(block_size=8),
                         root=pathlib.Path(root), keep_bytes=0)
print(loaded.fingerprint)
"""


# Two processes; the rename that it depends on is checked above.
@pytest.mark.slow
def test_two_processes_at_once(model, root, tmp_path, reads):
  """Both have written theirs before either gives it its name."""
  (tmp_path / "gate").mkdir()
  argv = [sys.executable, "-c", _START, model, root, tmp_path / "gate"]
  two = [subprocess.Popen(argv, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) for _ in range(2)]
  ends = [process.communicate(timeout=120) for process in two]
  fresh = load.load(str(model), SPEC)
  for out, err in ends:
    assert out.strip() == fresh.fingerprint, err
    assert "damaged" not in err and "not kept" not in err
  assert [p.name for p in root.iterdir() if p.name[0] == "."] == []
  reads.clear()
  assert_equal(start(model, root), fresh)
  assert not reads and len(folders(root)) == 1
