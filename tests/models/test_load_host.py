"""Bases that are read into host memory hold the bytes they would elsewhere."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from lora_jax import host as host_lib
from lora_jax import quant
from lora_jax import trees
from lora_jax.models import base_cache
from lora_jax.models import hf
from lora_jax.models import init
from lora_jax.models import load
from tests.models import tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  folder = tmp_path_factory.mktemp("model")
  config = tiny.CONFIGS["qwen2"]
  base = init.random_base(jax.random.key(0), config)
  (folder / "config.json").write_text(json.dumps(config.to_hf()))
  safetensors.numpy.save_file(
      dict(hf.state(config, base, "float32")), folder / "model.safetensors")
  return load.open_source(str(folder))


def check(ours, theirs):
  """The same values; matrices of layers in host memory and nothing else."""
  assert ours.fingerprint == theirs.fingerprint
  wanted = trees.paths(theirs.base)
  found = trees.paths(ours.base)
  assert list(found) == list(wanted)
  for path, x in found.items():
    np.testing.assert_array_equal(x, wanted[path], err_msg=path)
    away = path.startswith("layers.") and x.ndim == 3
    assert host_lib.in_host(x) == away, path
    assert x.sharding.memory_kind == ("pinned_host" if away else "device")
  assert sum(map(host_lib.in_host, jax.tree.leaves(ours.base))) >= 7


@pytest.mark.parametrize("fmt", ["nf4", "none"])
def test_it_is_put_together_there(source, fmt, monkeypatch):
  spec = quant.QuantSpec(fmt, block_size=4)
  theirs = load.convert(source, spec)
  # No stack of matrices is ever on the device.
  put, seen = load._put, []

  def watched(stack, one, layer):
    seen.extend(x.ndim for x in jax.tree.leaves(stack))
    return put(stack, one, layer)

  monkeypatch.setattr(load, "_put", watched)
  check(load.convert(source, spec, host=True), theirs)
  assert seen and max(seen) < 3


def test_from_the_cache_too(source, tmp_path):
  spec = quant.QuantSpec(block_size=4)
  theirs = load.convert(source, spec)
  made = base_cache.load(
      source, spec, root=tmp_path, host=True, keep_bytes=0)
  check(made, theirs)
  assert len(base_cache.entries(tmp_path)) == 1
  kept = base_cache.load(source, spec, root=tmp_path, host=True)
  check(kept, theirs)
  stored = base_cache.entries(tmp_path)[0]
  check(base_cache.load(stored, spec, root=None, host=True), theirs)
