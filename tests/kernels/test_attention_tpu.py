"""The TPU kernel compiles for TPUs, and a mesh cuts it without a gather."""

from __future__ import annotations

import dataclasses
import os
import re

import jax
from jax.experimental import topologies
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import mesh as mesh_lib
from lora_jax.kernels.attention import api
from lora_jax.kernels.attention import base

WINDOWS = (256, 2**30)


@pytest.fixture(scope="module")
def mesh():
  pytest.importorskip("libtpu")
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  chips = topologies.get_topology_desc(
      platform="tpu", topology_name="v5e:2x2").devices
  return jax.sharding.Mesh(
      np.asarray(chips).reshape(2, 1, 2), mesh_lib.AXES)


@pytest.mark.slow  # Each compilation takes seconds, and libtpu is optional.
@pytest.mark.parametrize("layout, t, e, fields", [
    ("packed", 1024, 128, {"softcap": 5.0}),
    ("packed", 200, 64, {}),
    ("single", 1024, 64, {"window": 256}),
    ("packed", 1024, 256, {"window": "traced"}),
])
def test_compiles_and_gathers_nothing(mesh, layout, t, e, fields):
  options = base.Options(layout=layout, windows=WINDOWS, mesh=mesh)

  def array(*shape, dtype=jnp.bfloat16, axes=("batch", None, "heads", None)):
    spec = mesh_lib.spec(mesh, shape, axes)
    return jax.ShapeDtypeStruct(
        shape, dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

  def loss(qkv, segments, window):
    call = base.Call(
        *qkv, segments, segments, segments, segments, options=options,
        **(fields | ({"window": window} if "window" in fields else {})))
    if fields.get("window") == 256:
      call = dataclasses.replace(call, window=256)
    chosen = api.chosen(call)
    assert chosen.__name__.endswith("splash")
    return chosen.run(call).astype(jnp.float32).sum()

  qkv = (array(4, t, 8, e), array(4, t, 2, e), array(4, t, 2, e))
  segments = array(4, t, dtype=jnp.int32, axes=("batch", None))
  window = array(dtype=jnp.int32, axes=())
  compiled = jax.jit(jax.grad(loss)).lower(qkv, segments, window).compile()
  text = compiled.as_text()
  assert "tpu_custom_call" in text
  assert not re.search(r"all-gather|all-to-all|collective-permute", text)
