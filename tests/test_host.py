"""What is kept in host memory, how it is named, and where it cannot be."""

from __future__ import annotations

import re
import types

import jax
import jax.numpy as jnp
import pytest

from lora_jax import errors
from lora_jax import host as host_lib


def test_kinds_are_sorted_and_known():
  assert host_lib.kinds(["optimiser", "base", "base"]) == ("base", "optimiser")
  assert host_lib.kinds([]) == ()
  with pytest.raises(errors.UsageError, match='did you mean "activations"'):
    host_lib.kinds(["activation"])


def test_a_device_without_host_memory():
  device = types.SimpleNamespace(
      device_kind="Toaster 3", addressable_memories=lambda: [
          types.SimpleNamespace(kind="device")])
  assert host_lib.check([], device) == ()
  with pytest.raises(errors.UserError, match=re.escape(
      "compute.offload=base: Toaster 3 has no pinned_host memory; leave it "
      "empty")):
    host_lib.check(["base"], device)
  assert host_lib.check(["base"], jax.devices()[0]) == ("base",)


def test_there_and_back():
  tree = {"a": jnp.arange(6.0).reshape(2, 3), "n": jnp.int32(1)}
  away = host_lib.on_host(tree)
  assert host_lib.in_host(away["a"]) and not host_lib.in_host(away["n"])
  assert away["a"].sharding.memory_kind == "pinned_host"
  back = host_lib.on_device(away)
  assert not host_lib.in_host(back["a"])
  assert (back["a"] == tree["a"]).all()
