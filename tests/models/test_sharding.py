"""Eight virtual devices compute what one does."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax import mesh as mesh_lib
from lora_jax import trees
from lora_jax.models import sharding

MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (1, 1, 8),
          "mixed": (2, 2, 2)}

# Compiling for eight devices takes seconds: one method on all meshes.
CASES = {"lora nf4": tuple(MESHES), "dora nf4": ("mixed",),
         "full none": ("mixed",)}


@pytest.fixture(scope="module")
def report():
  """Errors by method, format and mesh, from a process with 8 devices."""
  run = subprocess.run(
      [sys.executable, "-m", "tests.models.test_sharding"],
      cwd=pathlib.Path(__file__).parents[2], capture_output=True, text=True,
      timeout=600, env=os.environ | {
          "XLA_FLAGS": "--xla_force_host_platform_device_count=8"})
  assert run.returncode == 0, run.stderr[-3000:]
  return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("case, mesh", [
    (case, mesh) for case, names in CASES.items() for mesh in names])
def test_loss_and_gradients_equal_those_of_one_device(report, case, mesh):
  result = report[case][mesh]
  assert result["loss"] <= 1e-5
  assert max(result["grads"].values()) <= 1e-5, result["grads"]
  assert result["cut"] > 0 or mesh == "data"


def test_sizes_that_do_not_fit_are_named():
  with pytest.raises(errors.UsageError, match=r"mesh\.data=3"):
    mesh_lib.make(mesh_lib.MeshConfig(data=3), jax.devices()[:1])
  with pytest.raises(errors.UsageError, match="use -1 for one of them"):
    mesh_lib.make(mesh_lib.MeshConfig(data=-1, fsdp=-1), jax.devices()[:1])


def main() -> None:
  from tests.adapters import test_contract as contract

  found = {}
  for case, names in CASES.items():
    base, tree = contract.randomised(*case.split())
    trainable, frozen = adapters_lib.split(tree)
    data = jax.tree.map(
        lambda x: np.concatenate([x] * 4)[None], contract.batch())
    key = jax.random.key(0)
    value, grads = contract.gradient(trainable, frozen, base, data, key)
    cases = found[case] = {}
    for name in names:
      mesh = mesh_lib.make(mesh_lib.MeshConfig(*MESHES[name]))
      placed = [sharding.put(mesh, x) for x in (trainable, frozen, base)]
      cut = sum(not x.sharding.is_fully_replicated
                for x in jax.tree.leaves(placed))
      other, other_grads = contract.gradient(
          *placed, mesh_lib.put_batch(mesh, data), key)
      theirs = trees.paths(other_grads)
      cases[name] = {
          "cut": cut,
          "loss": abs(float(other - value)) / abs(float(value)),
          "grads": {
              p: float(np.linalg.norm(np.asarray(g) - np.asarray(theirs[p]))
                       / np.linalg.norm(g))
              for p, g in trees.paths(grads).items()}}
  print(json.dumps(found))


if __name__ == "__main__":
  main()
