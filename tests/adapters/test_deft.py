"""DEFT and PaRa against PEFT, and their starts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax.adapters import deft
from lora_jax.adapters import registry
from tests import tiny
from tests.adapters import against

peft = pytest.importorskip("peft")


def config(**options):
  return peft.DeftConfig(target_modules=["q_proj"], **options)


@pytest.mark.parametrize(("method", "options"), [
    ("deft", {"r": 3, "deft_dropout": 0.1}),
    ("deft", {"r": 3, "decomposition_method": "qr", "alpha": 5}),
    ("deft", {"r": 9, "alpha": 5}),  # More than the outputs.
    ("para", {"r": 3, "para": True}),
    ("para", {"r": 3, "para": True, "decomposition_method": "qr"}),
], ids=["relu", "qr", "capped", "para", "para-qr"])
def test_it_is_pefts(method, options):
  adapter, there = against.check(
      method, config(**options), 12, 7, tolerance=5e-6)
  assert adapter.p.shape == (7, min(options["r"], 7))
  far = against.start_distance(method, config(**options), 12, 7)
  assert far < 2e-6 if method == "deft" else far > 1e-5
  row = registry.method(method)
  written = row.form.config(registry.checked(adapters_lib.AdapterConfig(
      method=method, **row.form.block(config(**options).to_dict()))))
  assert written.items() <= config(**options).to_dict().items()
  if method == "para":
    return
  # R starts as W0 N / s: PEFT's, of the P that it drew.
  slot = against.slot("deft", config(**options), 12, 7, adapter.p.shape[1])
  drawn = deft.DEFT.from_peft(there.start, slot)
  _, n = drawn.projection()
  np.testing.assert_allclose(
      drawn.injection, there.weight @ n / slot.scale, rtol=1e-4, atol=1e-6)
  # Ours of a rank that is more than the outputs, too.
  whole = against.slot("deft", config(**options), 12, 7)
  fresh = deft.init(jax.random.key(0), jnp.asarray(there.weight), whole)
  assert abs(fresh.scale - slot.scale) < 1e-6


def test_orthogonal_directions_are_taken_out_of_every_output():
  adapter, there = against.check(
      "para", config(r=3, para=True, decomposition_method="qr"), 12, 7)
  q, _ = adapter.projection()
  y = adapter.apply(jnp.asarray(there.x), there.weight)
  assert np.abs(y @ q).max() < 1e-5
  assert np.abs(there.x @ there.weight @ q).max() > 0.1
  assert np.linalg.matrix_rank(adapter.merge(there.weight), 1e-4) == 4


def test_concrete_numbers():
  """y = (2, 3); P = (1, -1) reads max(P, 0) y = 2 and writes -2 (1, -1)."""
  one = lambda *rows: jnp.asarray(rows, jnp.float32)
  eye = jnp.eye(2)
  para = deft.PaRa(p=one([1], [-1]), rank=1)
  assert para.apply(one([2, 3]), eye).tolist() == [[0, 5]]
  # R = (10, 100) of s = 0.1 writes 32 (1, -1) on top.
  full = deft.DEFT(p=one([1], [-1]), rank=1, injection=one([10], [100]),
                   scale=jnp.float32(0.1), rate=0.0)
  assert tiny.distance(full.apply(one([2, 3]), eye), one([32, -27])) < 1e-6


def test_an_unknown_way_is_named():
  with pytest.raises(errors.UsageError, match=r"decomposition_method.*qr"):
    registry.checked(adapters_lib.AdapterConfig(
        method="deft", options={"decomposition_method": "qrs"}))
