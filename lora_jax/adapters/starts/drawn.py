"""Starts that are drawn: A B = 0, whatever the weight."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def kaiming(key, i, o, width, rank):
  """A `[i, width]` ~ U(+-1/sqrt(i)), B = 0; columns from `rank` on zero."""
  bound = i ** -0.5
  a = jax.random.uniform(key, (i, width), jnp.float32, -bound, bound)
  return a * used(width, rank), jnp.zeros((width, o), jnp.float32)


def gaussian(key, i, o, width, rank):
  """A `[i, width]` ~ N(0, 1/r^2), B = 0: PEFT's "gaussian"."""
  a = jax.random.normal(key, (i, width), jnp.float32)
  a = a / jnp.maximum(rank, 1)
  return a * used(width, rank), jnp.zeros((width, o), jnp.float32)


def orthogonal(key, i, o, width, rank):
  """A = X Q_odd / 10, B = Q_even' Y / 10: PEFT's "orthogonal".

  X `[i, r/2]` and Y `[r/2, o]` ~ N(0, 1); Q_odd and Q_even `[r/2, r]` are
  every other row of one random orthogonal matrix, so that Q_odd Q_even' = 0,
  hence A B = 0 with neither of them zero. Ranks are even.
  (https://datta0.github.io/posts/rethink-lora-init/)
  """
  square, left, right = jax.random.split(key, 3)
  within = used(width, rank)
  # Beyond the rank Q is the identity, which mixes nothing into the rest.
  q = jnp.where(within[:, None] * within > 0, jax.random.normal(
      square, (width, width), jnp.float32), jnp.eye(width))
  q, _ = jnp.linalg.qr(q)
  q = q * within
  half = used(width // 2, rank // 2)
  x = jax.random.normal(left, (i, width // 2), jnp.float32) * half
  y = jax.random.normal(right, (width // 2, o), jnp.float32) * half[:, None]
  return (jnp.matmul(x, q[0::2], precision="highest") / 10,
          jnp.matmul(q[1::2].T, y, precision="highest") / 10)


def embedding(key, v, d, width, rank):
  """A `[v, width]` = 0, B `[width, d]` ~ N(0, 1)."""
  b = jax.random.normal(key, (width, d), jnp.float32)
  return jnp.zeros((v, width), jnp.float32), b * used(width, rank)[:, None]


def used(width, rank):
  """1 for the columns of a layer of this rank, 0 for padding, `[width]`."""
  return (jnp.arange(width) < rank).astype(jnp.float32)
