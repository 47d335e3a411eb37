"""Layers in host memory compute what layers on the device do, and stay there.

CPUs have the kinds of memory too, so that all of it but the speed is real.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import memory
from lora_jax import trees
from lora_jax.models import decoder
from lora_jax.models import remat
from lora_jax.train import step as step_lib
from tests.adapters import test_contract as contract

KEY = jax.random.key(5)


def placed(method, fmt):
  """(trained, frozen, base on the device, base in host memory)."""
  base, tree = contract.randomised(method, fmt)
  return *adapters_lib.split(tree), base, memory.placed(base)


@functools.partial(jax.jit, static_argnames="settings")
def gradient(trained, frozen, base, settings):
  data = contract.stacked(contract.batch())
  return step_lib.loss_and_grads(
      trained, frozen, base, data, KEY, model=contract.CONFIG,
      settings=settings)


def settings(policy, *offload):
  return step_lib.Settings(remat=policy, noise=True, offload=offload)


def equal(ours, theirs, tolerance=1e-6):
  (value, grads), (expected, wanted) = ours, theirs
  assert abs(value - expected) <= tolerance * abs(expected)
  wanted = trees.paths(wanted)
  for path, g in trees.paths(grads).items():
    scale = np.linalg.norm(wanted[path])
    assert scale > 0, path
    assert np.linalg.norm(g - wanted[path]) <= tolerance * scale, path


@pytest.mark.parametrize("policy", remat.POLICIES)
@pytest.mark.parametrize("method, fmt", [
    ("lora", "nf4"), ("dora", "nf4"), ("lora", "none"), ("dora", "none")])
def test_same_loss_and_gradients(method, fmt, policy):
  trained, frozen, base, away = placed(method, fmt)
  expected = gradient(trained, frozen, base, settings(policy))
  equal(gradient(trained, frozen, away, settings(policy)), expected)
