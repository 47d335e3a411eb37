"""C3A against PEFT, its circulant blocks, and its gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax.adapters import c3a
from lora_jax.adapters import registry
from tests import tiny
from tests.adapters import against

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")


def config(**options):
  return peft.C3AConfig(target_modules=["q_proj"], **options)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_it_is_pefts(size):
  """Blocks of odd sizes too: half a spectrum does not tell their length."""
  against.check("c3a", config(block_size=size), 12, 24)


@pytest.mark.parametrize(
    "start", ["xavier_uniform", "kaiming_uniform", "gaussian", True, False])
def test_starts_are_pefts(start):
  which = config(block_size=2, init_weights=start)
  there = against.place(which, 40, 60).start["c3a_kernel"]
  fresh = c3a.init(
      jax.random.key(0), jnp.ones((40, 60)),
      against.slot("c3a", which, 40, 60)).kernel
  assert fresh.shape == there.shape == (30, 20, 2)
  np.testing.assert_allclose(np.std(fresh), np.std(there), rtol=0.1)
  if start != "gaussian":
    np.testing.assert_allclose(
        np.abs(fresh).max(), np.abs(there).max(), rtol=0.05)
  row = registry.method("c3a")
  written = row.form.config(registry.checked(adapters_lib.AdapterConfig(
      method="c3a", **row.form.block(which.to_dict()))))
  assert written["init_weights"] == (start or "xavier_uniform")


def test_concrete_numbers():
  """w = (1, 2, 3): row s, column t holds w[(s - t) mod 3], over i = 3."""
  adapter = c3a.C3A(
      kernel=jnp.asarray([[[1.0, 2.0, 3.0]]]), rank=np.int32(1))
  expected = np.array([[1, 3, 2], [2, 1, 3], [3, 2, 1]]) / 3
  zeros = jnp.zeros((3, 3))
  np.testing.assert_allclose(adapter.merge(zeros), expected, rtol=1e-6)
  np.testing.assert_allclose(
      adapter.apply(jnp.eye(3), zeros), expected, rtol=1e-6)
  assert not np.any(adapter.replace(rank=0).apply(jnp.eye(3), zeros))


def test_gradients_and_that_pefts_of_x_is_wrong():
  """PEFT 0.21.2's own backward pass turns the kernel the wrong way for x.

  y_t = sum_s x_s w[(s - t) mod p] has dL/dx_s = sum_t g_t w[(s - t) mod p]; it
  gives sum_t g_t w[(s + t) mod p]. For w it is right.
  """
  from peft.tuners.c3a import utils

  torch.manual_seed(0)
  x, w = torch.randn(3, 8), torch.randn(5, 2, 4)
  x.requires_grad_(), w.requires_grad_()
  y = utils.BlockCircularConvolution.apply(x, w) / 8
  torch.sin(y).sum().backward()
  theirs = x.grad.numpy(), w.grad.numpy()

  def loss(x, kernel, merged):
    adapter = c3a.C3A(kernel=kernel, rank=np.int32(1))
    zeros = jnp.zeros((8, 20))
    return jnp.sum(jnp.sin(
        x @ adapter.merge(zeros) if merged else adapter.apply(x, zeros)))

  values = [jnp.asarray(v.detach().numpy()) for v in (x, w)]
  found = jax.grad(loss, (0, 1))(*values, False)
  expected = jax.grad(loss, (0, 1))(*values, True)
  for ours, right in zip(found, expected):
    assert tiny.distance(ours, right) < 1e-5
  assert tiny.distance(found[1], theirs[1]) < 1e-5
  assert tiny.distance(found[0], theirs[0]) > 1e-2
  # By hand: x = (1, 0, 0), w = (1, 2, 3), L = y_1 = x_0 w_2 + x_1 w_0 + ...
  one = torch.tensor([[1.0, 0.0, 0.0]], requires_grad=True)
  kernel = torch.tensor([[[1.0, 2.0, 3.0]]])
  utils.BlockCircularConvolution.apply(one, kernel)[0, 1].backward()
  np.testing.assert_allclose(one.grad, [[2, 3, 1]], rtol=1e-6)
  adapter = c3a.C3A(kernel=jnp.asarray(kernel.numpy()), rank=np.int32(1))
  ours = jax.grad(lambda x: 3 * adapter.apply(x, jnp.zeros((3, 3)))[0, 1])(
      jnp.asarray([[1.0, 0.0, 0.0]]))
  np.testing.assert_allclose(ours, [[3, 1, 2]], rtol=1e-6)


@pytest.mark.parametrize(("options", "message"), [
    ({"block_size": 5}, r"block_size=5 does not divide 12 x 20"),
    ({"block_size": 0}, r"block_size=0 is out of range"),
    ({"init_weights": "xavier"}, r"init_weights.*xavier_uniform"),
])
def test_what_does_not_fit_is_named(options, message):
  with pytest.raises(errors.UsageError, match=message):
    checked = registry.checked(adapters_lib.AdapterConfig(
        method="c3a", options=options))
    slot = against.slot("c3a", config(block_size=4), 12, 20).replace(
        options=checked.options)
    c3a.init(jax.random.key(0), jnp.ones((12, 20)), slot)
