"""Starts that take A and B out of the weight; see the package's text."""

from __future__ import annotations

import functools
import zlib

import jax
import jax.numpy as jnp

from lora_jax import quant
from lora_jax.adapters.starts import drawn


def pissa(w, like, width, rank, scale, niter=None):
  """(what replaces the weight, A, B).

  Args:
    w: `[i, o]` float32, the original.
    like: the base's weight, whose type the replacement takes.
    width: columns of A; those from `rank` on are zero.
    rank: `[]` int32.
    scale: `[]`, s.
    niter: power iterations of the randomised SVD; None is the exact one.
  """
  a, b = _factors(w, width, rank, scale, niter)
  return left(w, a, b, scale, like), a, b


def loftq(w, like, width, rank, scale, iterations=1):
  """(what replaces the weight, A, B); see `pissa`."""
  a = jnp.zeros((w.shape[0], width), jnp.float32)
  b = jnp.zeros((width, w.shape[1]), jnp.float32)

  def alternate(_, found):
    _, a, b = found
    replacement = left(w, a, b, scale, like)
    residual = w - quant.dequantize(replacement, jnp.float32)
    return replacement, *_factors(residual, width, rank, scale)

  return jax.lax.fori_loop(0, iterations, alternate, (like, a, b))


def olora(w, like, width, rank, scale):
  """(what replaces the weight, A, B); see `pissa`.

  Of PEFT's weight W' `[o, i]` = Q R, which is the transpose of ours. A and B
  are not divided by s.
  """
  q, r = jnp.linalg.qr(w.T)
  a, b = columns(r.T, width, rank), columns(q, width, rank).T
  return left(w, a, b, scale, like), a, b


def left(w, a, b, scale, like):
  """W - s A B in the type of `like`."""
  w = w - scale * jnp.matmul(a, b, precision="highest")
  if isinstance(like, quant.QuantizedArray):
    return quant.quantize(w, quant.spec_of(like))
  return w.astype(like.dtype)


def columns(x, width, rank, first=0, step=1):
  """Columns first, first + step, ... of `x [n, m]` as `[n, width]`; zero from
  `rank` on, and where there are none."""
  wanted = first + step * jnp.arange(width)
  there = (wanted >= 0) & (wanted < x.shape[1])
  found = jnp.take(x, jnp.clip(wanted, 0, x.shape[1] - 1), axis=1)
  return jnp.where(there & (drawn.used(width, rank) > 0), found, 0.0)


def _factors(w, width, rank, scale, niter=None):
  """A `[i, width]` and B `[width, o]` with s A B = SVD_rank(w)."""
  if niter is None:
    u, s, vt = jnp.linalg.svd(w, full_matrices=False)
  else:
    u, s, vt = randomised_svd(w, width, niter)
  root = jnp.sqrt(s / scale)
  return (columns(u * root, width, rank),
          columns(vt.T * root, width, rank).T)


def randomised_svd(w, width, niter):
  """U, S, V' of `w`'s leading `width` directions, as `torch.svd_lowrank`."""
  i, o = w.shape
  # A fixed draw: what replaces the base must not depend on the run's seed, or
  # a folder could not be read again.
  key = jax.random.key(zlib.crc32(b"pissa"))
  matmul = functools.partial(jnp.matmul, precision="highest")
  q = jax.random.normal(key, (o, min(width, i, o)), jnp.float32)
  q, _ = jnp.linalg.qr(matmul(w, q))
  for _ in range(niter):
    q, _ = jnp.linalg.qr(matmul(w.T, q))
    q, _ = jnp.linalg.qr(matmul(w, q))
  u, s, vt = jnp.linalg.svd(matmul(q.T, w), full_matrices=False)
  return matmul(q, u), s, vt
