"""What a second start takes, beside a conversion and the disk's own rate."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import time

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from lora_jax import quant
from lora_jax import trees
from lora_jax.models import base_cache
from lora_jax.models import hf
from lora_jax.models import load
from tests.models import tiny

# About TinyLlama's shape: 1.0e9 parameters, 2.1 GB of bfloat16.
LARGE = dataclasses.replace(
    tiny.CONFIGS["mistral"], vocab_size=32000, d_model=2048, d_ff=5632,
    n_layers=20, n_heads=32, n_kv_heads=4, head_dim=64, max_position=2048)


def write_large(folder: pathlib.Path) -> None:
  """Random bfloat16, in files of 8 tensors."""
  folder.mkdir()
  rng = np.random.default_rng(0)
  block = rng.standard_normal(2**22, np.float32).astype(ml_dtypes.bfloat16)
  names, where = hf.names(LARGE), {}
  (folder / "config.json").write_text(json.dumps(LARGE.to_hf()))
  for i in range(0, len(names), 8):
    file = f"model-{i:05}.safetensors"
    part = {}
    for name in list(names)[i:i + 8]:
      count = int(np.prod(names[name]))
      part[name] = np.resize(np.roll(block, len(where)), count).reshape(
          names[name])
      where[name] = file
    safetensors.numpy.save_file(part, folder / file)
  (folder / hf.INDEX).write_text(json.dumps({"weight_map": where}))


def forget(folder: pathlib.Path) -> None:
  """Drops a folder's files from the page cache, as far as Linux will."""
  for path in folder.rglob("*"):
    if path.is_file():
      with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain(folder: pathlib.Path) -> float:
  """Seconds that reading the bytes of a folder's files takes."""
  start = time.perf_counter()
  buffer = bytearray(2**23)
  for path in folder.rglob("*"):
    if path.is_file():
      with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
          pass
  return time.perf_counter() - start


def timed(do, *args, **options):
  start = time.perf_counter()
  found = do(*args, **options)
  jax.block_until_ready(found.base)
  return found, time.perf_counter() - start


@pytest.mark.slow  # Writes and converts 2 GB; two minutes.
@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="Linux")
@pytest.mark.parametrize("name", ["smollm2", "large"])
def test_a_second_start(name, tmp_path, request):
  if name == "smollm2":
    path = request.getfixturevalue("smollm2_path")
  else:
    path = tmp_path / "model"
    write_large(path)
  spec, root = quant.QuantSpec(), tmp_path / "bases"
  source = load.open_source(str(path))
  # Its seconds are those of a first start, compilation included.
  fresh, first = timed(load.convert, source, spec)
  stored = base_cache.keep(source, spec, root=root)
  megabytes = trees.nbytes(fresh.base) / 1e6
  cold, warm, disk, again = [], [], [], []
  for _ in range(3):
    forget(stored.path)
    disk.append(plain(stored.path))
    again.append(plain(stored.path))
    forget(stored.path)
    found, seconds = timed(base_cache.load, source, spec, root=root)
    cold.append(seconds)
    warm.append(timed(base_cache.load, source, spec, root=root)[1])
  for a, b in zip(jax.tree.leaves(found.base), jax.tree.leaves(fresh.base),
                  strict=True):
    np.testing.assert_array_equal(a, b)
  print(f"\n{name}: base {megabytes:,.0f} MB, conversion {first:.2f} s, "
        f"written at {megabytes / stored.manifest['write_seconds']:,.0f} MB/s")
  for what, ours, theirs in (("not cached", cold, disk),
                             ("cached", warm, again)):
    print(f"  files {what}: second start {min(ours):.2f} s = "
          f"{megabytes / min(ours):,.0f} MB/s, plain read "
          f"{megabytes / min(theirs):,.0f} MB/s, ratio "
          f"{min(theirs) / min(ours):.2f}")
  assert min(cold) < first
