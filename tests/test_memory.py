"""What is kept in host memory, how it is named, and where it cannot be."""

from __future__ import annotations

import re
import types

import jax
import jax.numpy as jnp
import pytest

from lora_jax import errors
from lora_jax import memory


def test_kinds_are_sorted_and_known():
  assert memory.kinds(["optimiser", "base", "base"]) == ("base", "optimiser")
  assert memory.kinds([]) == ()
  with pytest.raises(errors.UsageError, match='did you mean "activations"'):
    memory.kinds(["activation"])


def test_a_device_without_host_memory():
  device = types.SimpleNamespace(
      device_kind="Toaster 3", addressable_memories=lambda: [
          types.SimpleNamespace(kind="device")])
  assert memory.check([], device) == ()
  with pytest.raises(errors.UserError, match=re.escape(
      "compute.offload=base: Toaster 3 has no pinned_host memory; leave it "
      "empty")):
    memory.check(["base"], device)
  assert memory.check(["base"], jax.devices()[0]) == ("base",)


def test_there_and_back():
  tree = {"a": jnp.arange(6.0).reshape(2, 3), "n": jnp.int32(1)}
  away = memory.on_host(tree)
  assert memory.in_host(away["a"]) and not memory.in_host(away["n"])
  assert away["a"].sharding.memory_kind == "pinned_host"
  back = memory.on_device(away)
  assert not memory.in_host(back["a"])
  assert (back["a"] == tree["a"]).all()
