"""Attention by a kernel that keeps its sums: forwards once, and by rows."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import keep as keep_lib
from lora_jax.kernels.attention import plain
from lora_jax.kernels.attention import rows

M, B, T, H, E = 3, 2, 16, 4, 8
SEEN: list[tuple[int, ...]] = []


def _logits(q, k, bias):
  return jnp.einsum("bthe,bshe->bhts", q, k) * E**-0.5 + bias


def _forward(q, k, v, bias):
  """As cuDNN does: with the logarithms of the softmax's sums."""
  logits = _logits(q, k, bias)
  sums = jax.nn.logsumexp(logits, axis=-1)

  def noted(sums):
    SEEN.append(sums.shape)
    return sums

  sums = jax.pure_callback(
      noted, jax.ShapeDtypeStruct(sums.shape, sums.dtype), sums)
  out = jnp.einsum("bhts,bshe->bthe", jnp.exp(logits - sums[..., None]), v)
  return out, (q, k, v, bias, jnp.zeros(0), sums, out)


@jax.custom_vjp
def kernel(q, k, v, bias):
  return _forward(q, k, v, bias)[0]


def _backward(kept, g):
  q, k, v, bias, _, sums, out = kept
  p = jnp.exp(_logits(q, k, bias) - sums[..., None])
  inner = jnp.einsum("bthe,bthe->bht", g, out)[..., None]
  d = p * (jnp.einsum("bthe,bshe->bhts", g, v) - inner) * E**-0.5
  return (jnp.einsum("bhts,bshe->bthe", d, k),
          jnp.einsum("bhts,bthe->bshe", d, q),
          jnp.einsum("bhts,bthe->bshe", p, g), None)


kernel.defvjp(_forward, _backward)


def attend(q, k, v, mask):
  return kernel(q, k, v, jnp.where(mask, 0.0, -1e30))


def apart(keep, q, k, v, mask):
  operands = (q, k, v, mask)
  return rows.attached(attend, operands, keep(
      "o", rows.forward(attend, operands)))


def operands():
  q, k, v = jax.random.normal(jax.random.key(0), (3, M, B, T, H, E))
  cuts = jax.random.randint(jax.random.key(1), (M, B, 1), 2, T)
  segments = 1 + (jnp.arange(T) >= cuts)
  index = jnp.broadcast_to(jnp.arange(T), (M, B, T))
  mask = jax.vmap(plain.visible)(index, index, segments, segments)
  return q, k, v, mask[:, :, None]


def loss(run, q, k, v, mask):
  return jnp.sum(jnp.sin(run(q, k, v, mask)))


@pytest.mark.parametrize("policy", [None, "o"])
def test_forwards_once(policy):
  """Whether everything is kept or the output; all values are the kernel's."""
  q, k, v, mask = (x[0] for x in operands())
  run = functools.partial(
      loss, functools.partial(apart, keep_lib.named))
  alone = functools.partial(
      loss, lambda *o: keep_lib.named("o", attend(*o)))
  if policy is not None:
    run, alone = (jax.checkpoint(
        f, policy=jax.checkpoint_policies.save_only_these_names(policy))
                  for f in (run, alone))
  SEEN.clear()
  want = jax.jit(jax.value_and_grad(alone, (0, 1, 2)))(q, k, v, mask)
  jax.block_until_ready(want)
  if policy is not None:  # The kernel by itself.
    assert len(SEEN) == 2
  SEEN.clear()
  got = jax.jit(jax.value_and_grad(run, (0, 1, 2)))(q, k, v, mask)
  jax.block_until_ready(got)
  assert len(SEEN) == 1
  jax.tree.map(functools.partial(
      np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, want)


@pytest.mark.parametrize("own_mask", [False, True])
def test_members_rows_are_rows(own_mask):
  q, k, v, mask = operands()
  axes = (0, 0, 0, 0 if own_mask else None)
  mask = mask if own_mask else mask[0]
  plainly = functools.partial(
      loss, lambda q, k, v, mask: jax.nn.dot_product_attention(
          q, k, v, mask=mask))

  def members(one):
    return jax.jit(jax.vmap(jax.value_and_grad(one, (0, 1, 2)), axes))(
        q, k, v, mask)

  SEEN.clear()
  got = members(functools.partial(
      loss, functools.partial(apart, keep_lib.nothing)))
  jax.block_until_ready(got)
  assert SEEN == [(M * B, H, T)]
  jax.tree.map(functools.partial(
      np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, members(plainly))


def test_under_two_vmaps():
  q, k, v, mask = operands()
  k = jnp.stack([k, 2 * k])

  def twice(run):
    one = jax.grad(functools.partial(loss, run), (0, 1, 2))
    return jax.jit(jax.vmap(
        jax.vmap(one), (None, 0, None, None)))(q, k, v, mask)

  SEEN.clear()
  got = twice(functools.partial(apart, keep_lib.nothing))
  jax.block_until_ready(got)
  assert SEEN == [(2 * M * B, H, T)]
  jax.tree.map(functools.partial(
      np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, twice(
          lambda q, k, v, mask: jax.nn.dot_product_attention(
              q, k, v, mask=mask)))
