"""Stored bases read straight onto a mesh, by one process and by two."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import socket
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest

from lora_jax import errors
from lora_jax import mesh as mesh_lib
from lora_jax import quant
from lora_jax import trees
from lora_jax.models import base_arrays
from lora_jax.models import base_store
from lora_jax.models import base_tree
from lora_jax.models import decoder
from lora_jax.models import init
from lora_jax.models import sharding
from tests import devices
from tests.models import tiny

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = dataclasses.replace(
    tiny.CONFIGS["qwen2"], vocab_size=64, d_model=32, d_ff=64,
    tie_embeddings=False)
SPEC = quant.QuantSpec(block_size=4, double=True)
RECIPE = base_store.Recipe.of(SPEC, "float32", ("lm_head", "embed_tokens"))
MESHES = {"fsdp": (1, 8, 1), "tensor": (1, 1, 8), "mixed": (2, 2, 2)}


def store(folder):
  """Writes a base of NF4 and float32; returns it."""
  base = init.random_base(jax.random.key(5), CONFIG)
  base = base.replace(layers={
      name: x if not isinstance(x, decoder.Linear) else x.replace(
          weight=quant.quantize(x.weight, SPEC))
      for name, x in base.layers.items()})
  folder.mkdir()
  base_store.write(folder, CONFIG, base, RECIPE, "f" * 64, source="here")
  return base


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
  folder = tmp_path_factory.mktemp("stored") / "base"
  return folder, store(folder)


def run(folder, processes, count):
  """What `main` finds in each of several processes of a job."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = str(free.getsockname()[1])
  jobs = [subprocess.Popen(
      [sys.executable, "-m", "tests.models.test_base_restore", folder,
       str(i), str(processes), port],
      cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
      env=devices.environ(count)) for i in range(processes)]
  ends = [job.communicate(timeout=240) for job in jobs]
  assert all(job.returncode == 0 for job in jobs), ends
  return [json.loads(out.splitlines()[-1]) for out, _ in ends]


def test_eight_devices_hold_their_parts(stored):
  found, = run(stored[0], 1, 8)
  for name, leaves in found.items():
    assert all(leaf["equal"] and leaf["placed"] for leaf in leaves.values())
    codes = leaves["layers.q_proj.weight.codes"]
    ways = {"fsdp": 8, "tensor": 8, "mixed": 4}[name]
    assert codes["held"] == [codes["size"] // ways] * 8
    whole = leaves["layers.q_proj.weight.scales.offset"]
    assert whole["held"] == [whole["size"]] * 8


# Two processes; eight devices of one hold their parts in the next.
@pytest.mark.slow
def test_each_of_two_processes_reads_its_half(stored):
  for found in run(stored[0], 2, 4):
    for name in ("fsdp", "tensor"):
      leaves = found[name]
      assert all(leaf["equal"] and leaf["placed"] for leaf in leaves.values())
      for path in ("layers.up_proj.weight.codes", "embed_tokens"):
        assert leaves[path]["read"] == leaves[path]["size"] // 2


def main(folder, process, count, port) -> None:
  """Prints what this process read and holds, by mesh and path."""
  if int(count) > 1:
    jax.distributed.initialize(
        f"localhost:{port}", num_processes=int(count),
        process_id=int(process))
  read = {}
  begin = base_arrays._start

  def noted(folder, path, leaf, where):
    found = begin(folder, path, leaf, where)
    read[path] = int(np.prod([s.stop - s.start for s in found[1]]))
    return found

  base_arrays._start = noted
  expected = trees.paths(store(pathlib.Path(folder).with_name(
      f"own-{process}-of-{count}")))
  opened, found = base_store.Stored.open(pathlib.Path(folder)), {}
  for name, sizes in MESHES.items():
    mesh = mesh_lib.make(mesh_lib.MeshConfig(*sizes))
    base = opened.base(mesh)
    leaves, homes = (trees.paths(x) for x in (
        base, sharding.shardings(mesh, base)))
    assert leaves.keys() == expected.keys() == read.keys()
    found[name] = {path: {
        "equal": all(np.array_equal(s.data, np.asarray(expected[path])[s.index])
                     for s in leaf.addressable_shards),
        "placed": leaf.sharding == homes[path],
        "held": [s.data.size for s in leaf.addressable_shards],
        "size": leaf.size, "read": read[path],
    } for path, leaf in leaves.items()}
  print(json.dumps(found))


def test_float32_is_rounded_as_a_conversion_rounds(stored):
  folder, base = stored
  opened = base_store.Stored.open(folder)
  half = opened.converted(SPEC, "bfloat16", RECIPE.skip)
  np.testing.assert_array_equal(
      half.embed_tokens, np.asarray(base.embed_tokens).astype(
          ml_dtypes.bfloat16))
  scales = half.layers["q_proj"].weight.scales
  assert scales.nested_absmax.dtype == np.float32
  with pytest.raises(errors.UserError, match="stored as nf4 block_size=4"):
    opened.converted(quant.QuantSpec(block_size=8), "float32", RECIPE.skip)


def test_bfloat16_is_not_widened(tmp_path):
  recipe = dataclasses.replace(RECIPE, dtype="bfloat16")
  (tmp_path / "base").mkdir()
  base_store.write(tmp_path / "base", CONFIG, {}, recipe, "f")
  opened = base_store.Stored.open(tmp_path / "base")
  with pytest.raises(errors.UserError, match="dtype=bfloat16"):
    opened.converted(SPEC, "float32", RECIPE.skip)


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_configs_come_back(tmp_path, name):
  base_store.write(tmp_path, tiny.CONFIGS[name], {}, RECIPE, "f")
  assert base_store.Stored.open(tmp_path).config == tiny.CONFIGS[name]


def test_trees_come_back():
  for form in quant.FORMATS:
    spec = quant.QuantSpec(form, 4)
    tree = decoder.Linear(weight=jax.eval_shape(
        lambda w: quant.quantize(w, spec), np.ones((8, 2))))  # noqa: B023
    found = base_tree.template(json.loads(json.dumps(
        base_tree.describe(tree))))
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    assert jax.tree.leaves(found) == jax.tree.leaves(tree)
  with pytest.raises(errors.UserError, match="RopeConfig"):
    base_tree.describe({"a": CONFIG.rope})


@pytest.mark.parametrize("shape, size, expected", [
    ((), 4, []), ((7,), 4, [7]), ((32, 2048, 4096), 1, [1, 2048, 2048]),
    ((80, 14336, 8192), 1, [1, 1792, 2048]), ((30, 8, 576), 1, [30, 8, 576]),
    ((49152, 576), 4, [1536, 576])])
def test_chunks(shape, size, expected):
  assert base_arrays.chunk(shape, size) == expected


def test_the_arrays_are_zarr_that_tensorstore_opens_by_itself(stored):
  """Without our metadata: what is in the folder says all."""
  import tensorstore

  folder, base = stored
  store = tensorstore.open({
      "driver": "zarr3", "kvstore": {
          "driver": "ocdbt", "base": f"file://{folder}/arrays/",
          "path": "layers.up_proj.weight.codes/"}}).result()
  np.testing.assert_array_equal(
      store.read().result(), base.layers["up_proj"].weight.codes)


if __name__ == "__main__":
  main(*sys.argv[1:])
