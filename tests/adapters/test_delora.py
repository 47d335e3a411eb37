"""DeLoRA against PEFT, gradients too, and what its lambda bounds."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax.adapters import delora
from lora_jax.adapters import registry
from tests import tiny
from tests.adapters import against

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")


def config(**options):
  return peft.DeloraConfig(target_modules=["q_proj"], **options)


def test_it_is_pefts():
  adapter, there = against.check(
      "delora", config(r=3, delora_lambda=7.5, module_dropout=0.2), 12, 20)
  assert adapter.rate == np.float32(0.2)
  start = config(r=3, delora_lambda=7.5)
  assert against.start_distance("delora", start, 12, 20) == 0
  fresh = delora.init(
      jax.random.key(0), jnp.asarray(there.weight),
      against.slot("delora", start, 12, 20)).to_peft()
  assert fresh["delora_lambda"].tolist() == [7.5]
  np.testing.assert_allclose(
      fresh["delora_w_norm"], there.start["delora_w_norm"], rtol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e-6, 0.0])
def test_gradients_are_pefts_where_norms_are_small_too(scale):
  """At B = 0, where a norm has none, and where the least norm counts."""
  torch.manual_seed(0)
  a, b, lam, w, x = (torch.randn(*s, dtype=torch.float64) for s in (
      (2, 5), (4, 2), (1,), (5,), (3, 5)))
  b = b * scale
  for value in (a, b, lam):
    value.requires_grad_()
  from peft.tuners.delora.layer import DeloraLayer

  delta = DeloraLayer._compute_delta(a, b, lam, 2, w)
  torch.sin(x @ delta.T).sum().backward()
  ours = delora.DeLoRA(
      a=jnp.asarray(a.detach().numpy().T, jnp.float32),
      b=jnp.asarray(b.detach().numpy().T, jnp.float32),
      boundary=jnp.float32(lam.item()),
      norms=jnp.asarray(w.numpy(), jnp.float32), rate=0.0, rank=np.int32(2))
  grads = jax.grad(lambda m: jnp.sum(jnp.sin(m.down_up(
      jnp.asarray(x.numpy(), jnp.float32)))), allow_int=True)(ours)
  for found, expected in ((grads.a.T, a.grad), (grads.b.T, b.grad),
                          (grads.boundary, lam.grad[0])):
    expected = expected.numpy()
    size = np.abs(expected).max()
    assert np.abs(found - expected).max() <= 1e-4 * size + 1e-12


def test_lambda_bounds_the_change_whatever_a_and_b_are():
  key = jax.random.key(0)
  adapter = delora.DeLoRA(
      a=100 * jax.random.normal(key, (12, 4)),
      b=100 * jax.random.normal(key, (4, 20)), boundary=jnp.float32(2),
      norms=jnp.ones(12), rate=0.0, rank=np.int32(3))
  norm = jnp.linalg.norm(adapter.merge(jnp.zeros((12, 20))))
  assert 0.5 < norm <= 2 + 1e-5
  # Three equal directions add up to all of it; the fourth is padding.
  same = adapter.replace(a=jnp.ones((12, 4)), b=jnp.ones((4, 20)))
  assert tiny.distance(
      jnp.linalg.norm(same.merge(jnp.zeros((12, 20)))), 2.0) < 1e-6


def test_a_bad_lambda_is_named():
  with pytest.raises(errors.UsageError, match=r"delora_lambda=0.0 is out of"):
    registry.checked(adapters_lib.AdapterConfig(
        method="delora", options={"delora_lambda": 0}))
