"""Steps of AdaLoRA on eight virtual devices, and on one.

  XLA_FLAGS=--xla_force_host_platform_device_count=8 \\
      python -m tests.train.rules_sharded

In a process of its own: a device count is fixed when JAX starts. Prints a
JSON object.
"""

from __future__ import annotations

import functools
import json

import jax
import numpy as np

from lora_jax import adapters as adapters_lib
from lora_jax import mesh as mesh_lib
from lora_jax import trees
from lora_jax.adapters import registry
from lora_jax.models import sharding
from lora_jax.train import optim
from lora_jax.train import step
from tests import tiny
from tests.adapters import contract

STEPS = 2
BLOCK = contract.block(
    "adalora", targets="q_proj,down_proj",
    options={"target_r": 2, "orth_reg": 0.1})


def train(base, params, frozen, rules, mesh):
  put = (lambda x: x) if mesh is None else functools.partial(
      sharding.put, mesh)
  data = jax.tree.map(
      lambda x: np.concatenate([x] * 2)[None], contract.batch())
  batch = data if mesh is None else mesh_lib.put_batch(mesh, data)
  state = put(step.init_state(params, rules=rules))
  frozen, base = put(frozen), put(base)
  for _ in range(STEPS):
    state, _ = step.train_step(
        state, frozen, base, batch,
        optim.hyper(optim.OptimConfig(eps=1e-2), 1e-2), jax.random.key(0),
        model=contract.CONFIG, settings=step.Settings(mesh=mesh, rules=rules))
  return state


def main():
  base, tree = adapters_lib.build(
      jax.random.key(1), BLOCK, contract.quantised("nf4"),
      tiny.paths(contract.CONFIG), geometry=contract.GEOMETRY)
  tree = tiny.mask(contract.moved(tree))
  rules = registry.rules(BLOCK, 4, tree)
  params, frozen = adapters_lib.split(tree)
  one, many = (train(base, params, frozen, rules, mesh) for mesh in (
      None, mesh_lib.make(mesh_lib.MeshConfig(2, 2, 2))))
  expected = trees.paths(one.params)
  worst = max(float(np.abs(np.asarray(x) - np.asarray(expected[p])).max())
              for p, x in trees.paths(many.params).items())

  def kept(state):
    return [(np.asarray(a.e) != 0).sum(-1).tolist()
            for a in state.params.layers.values()]

  importance = many.opt_state[1].importance.layers["q_proj"].a
  spec = importance.sharding.spec
  print(json.dumps({
      "kept": kept(many), "expected": kept(one), "worst": worst,
      "spec": [s if isinstance(s, str) else "None" if s is None else s[0]
               for s in (*spec, None, None, None)[:3]]}))


if __name__ == "__main__":
  main()
