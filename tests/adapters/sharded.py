"""Loss and gradients of methods on eight virtual devices, and on one.

  XLA_FLAGS=--xla_force_host_platform_device_count=8 \\
      python -m tests.adapters.sharded METHOD ...

In a process of its own: a device count is fixed when JAX starts. Prints a
JSON object: by method, the two losses and the worst distance of a gradient.
"""

from __future__ import annotations

import functools
import json
import sys

import jax
import numpy as np

from lora_jax import adapters as adapters_lib
from lora_jax import mesh as mesh_lib
from lora_jax import trees
from lora_jax.models import sharding
from lora_jax.train import step as step_lib
from tests.adapters import contract


@functools.partial(jax.jit, static_argnames="mesh")
def gradient(trainable, frozen, base, data, mesh=None):
  value, grads = step_lib.loss_and_grads(
      trainable, frozen, base, data, jax.random.key(0), model=contract.CONFIG,
      settings=step_lib.Settings(mesh=mesh))
  return value, sharding.constrain(mesh, grads)


def measure(method):
  base, tree = contract.randomised(method, "nf4")
  trainable, frozen = adapters_lib.split(tree)
  data = jax.tree.map(
      lambda x: np.concatenate([x] * 2)[None], contract.batch_of(tree))
  mesh = mesh_lib.make(mesh_lib.MeshConfig(2, 2, 2))
  put = functools.partial(sharding.put, mesh)
  one, expected = gradient(trainable, frozen, base, data)
  many, grads = gradient(put(trainable), put(frozen), put(base),
                         mesh_lib.put_batch(mesh, data), mesh)
  expected = trees.paths(expected)
  worst = max(
      float(np.linalg.norm(np.asarray(x) - np.asarray(expected[path]))
            / max(np.linalg.norm(expected[path]), 1e-30))
      for path, x in trees.paths(grads).items())
  return {"losses": [float(one), float(many)], "worst": worst}


if __name__ == "__main__":
  print(json.dumps({name: measure(name) for name in sys.argv[1:]}))
