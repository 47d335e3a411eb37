"""LoRA-XS against its equation."""

from __future__ import annotations

import jax
import numpy as np

from lora_jax.adapters import base as base_lib
from lora_jax.adapters import lora_xs


def test_the_equation():
  rng = np.random.default_rng(0)
  w = rng.standard_normal((6, 5)).astype(np.float32)
  slot = base_lib.Slot(
      rank=np.int32(2), scale=np.float32(3.0), rate=np.float32(0), width=2)
  adapter = lora_xs.init(jax.random.key(0), w, slot)
  # A B is the best approximation of rank 2.
  u, s, vt = np.linalg.svd(w)
  best = (u[:, :2] * s[:2]) @ vt[:2]
  np.testing.assert_allclose(adapter.a @ adapter.b, best, atol=1e-5)
  core = np.array([[1.0, 2.0], [0.0, -1.0]], np.float32)
  x = rng.standard_normal((3, 6)).astype(np.float32)
  expected = x @ w + 3 * x @ np.asarray(adapter.a) @ core @ np.asarray(
      adapter.b)
  found = adapter.replace(core=core).apply(x, w)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
