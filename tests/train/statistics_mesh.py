"""What `test_statistics` asserts on, measured on two virtual devices.

  XLA_FLAGS=--xla_force_host_platform_device_count=2 \\
      python -m tests.train.statistics_mesh

Prints by target how far cut sums are from whole ones.
"""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np

from lora_jax import adapters as adapters_lib
from lora_jax import mesh as mesh_lib
from lora_jax.data import packing
from lora_jax.data import templates
from lora_jax.kernels import attention
from lora_jax.models import init
from lora_jax.models import sharding
from lora_jax.train import statistics
from lora_jax.train import step
from tests import tiny

CONFIG = tiny.CONFIGS["mistral"]


def main():
  mesh = mesh_lib.make(mesh_lib.MeshConfig(data=1, fsdp=2))
  base = init.random_base(jax.random.key(0), CONFIG)
  rng = np.random.default_rng(0)
  rows = [templates.Encoded(
      tokens=rng.integers(0, 61, n).astype(np.int32),
      weights=np.ones(n, np.float32)) for n in (5, 8)]
  batch = packing.fill([[0], [1]], rows, 8)
  whole = step.Settings(
      remat="full", attention=attention.Options(layout="single"))
  cut = dataclasses.replace(
      whole, mesh=mesh,
      attention=attention.Options(layout="single", mesh=mesh))
  informed = adapters_lib.AdapterConfig(init="eva").start().informed
  pairs = [
      (base, batch, whole),
      (sharding.put(mesh, base), mesh_lib.put_batch(mesh, batch), cut)]
  found = {}
  for name in ("down_proj", "lm_head"):
    inputs = [statistics.inputs(
        b, rows, names=(name,), informed=informed, model=CONFIG,
        settings=settings)[name]["gram"] for b, rows, settings in pairs]
    gradients = [statistics.gradients(
        b, rows, names=(name,), model=CONFIG, settings=settings)[name]
        for b, rows, settings in pairs]
    found[name] = [tiny.distance(*x[::-1]) for x in (inputs, gradients)]
  print(json.dumps(found))


if __name__ == "__main__":
  main()
