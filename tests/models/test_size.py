"""Bytes of a base, told before it is read; and where they send it."""

from __future__ import annotations

import json

import jax
import pytest
import safetensors.numpy

from lora_jax import api
from lora_jax import host as host_lib
from lora_jax import mesh as mesh_lib
from lora_jax import quant
from lora_jax import trees
from lora_jax.models import base_cache
from lora_jax.models import base_store
from lora_jax.models import hf
from lora_jax.models import init
from lora_jax.models import load
from lora_jax.models import size
from lora_jax.train import footprint
from lora_jax.train import memory
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


@pytest.mark.parametrize("fmt", ["nf4", "none"])
def test_it_is_what_is_read(source, fmt, tmp_path):
  spec = quant.QuantSpec(fmt, block_size=4)
  loaded = load.convert(source, spec)
  wanted = trees.nbytes(loaded.base)
  assert size.nbytes(source, spec) == wanted
  recipe = base_store.Recipe.of(spec, "float32", load.SKIP)
  base_store.write(tmp_path, loaded.config, loaded.base, recipe,
                   loaded.fingerprint)
  stored = base_store.Stored.open(tmp_path)
  assert size.nbytes(stored, spec) == wanted
  mesh = mesh_lib.make(mesh_lib.MeshConfig())  # Of one device.
  assert size.nbytes(source, spec, mesh=mesh) == wanted


class Caught(Exception):
  pass


@pytest.mark.parametrize("share, offload, host", [
    (1.12, (), False), (1.10, (), True),
    # What is set is kept, and without a budget nothing is known.
    (0.5, ("optimiser",), False), (0.0, (), False),
])
def test_a_base_that_cannot_fit_is_read_into_host_memory(
    source, share, offload, host, monkeypatch):
  monkeypatch.setattr(host_lib, "ONE_MEMORY", ())
  monkeypatch.setattr(memory, "GIB", 1)

  def caught(*args, **options):
    raise Caught(options["host"])

  monkeypatch.setattr(base_cache, "load", caught)
  budget = share * size.nbytes(source)
  with pytest.raises(Caught) as found:
    api.load(source.label, offload=offload, cache=False,
             memory=memory.MemoryConfig(budget))
  assert found.value.args == (host,)
  assert not footprint.outgrows(None, lambda: 1 << 60)
  monkeypatch.setattr(host_lib, "ONE_MEMORY", ("cpu",))
  assert not footprint.outgrows(memory.MemoryConfig(1.0), lambda: 1 << 60)
