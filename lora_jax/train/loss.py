"""Next-token cross-entropy without the logits of a batch.

The logits of 8192 tokens over 128,256 words are 4 GiB in float32. They are
made a chunk of tokens at a time. The gradient is taken in the forward pass,
chunk by chunk (the loss is a sum, so its cotangent is one scalar): neither
are logits kept, nor is the head's product computed twice (the idea of
Liger's fused linear cross-entropy, arXiv 2410.10989).
"""

from __future__ import annotations

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp

from lora_jax import types

# Elements of one chunk of float32 logits: 64 MiB.
CHUNK_ELEMENTS = 2**24


def token_nll(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """-log p(target), `[...]` float32, for `logits [..., v]`."""
  logits = logits.astype(jnp.float32)
  # A lookup's gradient is a scatter, which takes a pass of its own.
  words = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
  picked = jnp.sum(
      jnp.where(words == targets[..., None], logits, 0.0), axis=-1)
  return jax.nn.logsumexp(logits, axis=-1) - picked


def chunk_size(tokens: int, vocab_size: int, ways: int = 1) -> int:
  """Tokens a chunk: a power of two whose logits fit `CHUNK_ELEMENTS`.

  Args:
    tokens: of the batch, and so at most of a chunk.
    vocab_size: v.
    ways: in how many parts the rows are cut; each has its own chunk.
  """
  fit = max(CHUNK_ELEMENTS // vocab_size, 16)
  return min(ways << (fit.bit_length() - 1), max(tokens, 1))


def chunks(tree: types.Tree, size: int) -> types.Tree:
  """`[b, t, ...]` leaves as `[n, b, c, ...]`, padded with zeros.

  A chunk is some columns, c, of every row: on a mesh each device has its part
  of the rows in every chunk. b * c is at most `size`, unless c is 1.
  """

  def cut(x):
    b, t, *rest = x.shape
    c = min(max(size // b, 1), t)
    x = jnp.pad(x, ((0, 0), (0, -t % c)) + ((0, 0),) * len(rest))
    return jnp.moveaxis(x.reshape(b, -1, c, *rest), 1, 0)

  return jax.tree.map(cut, tree)


def weighted_nll(
    unembed: Callable,
    trainable: types.Tree,
    frozen: types.Tree,
    hidden: jax.Array,
    per_token: types.Tree,
    vocab_size: int,
    ways: int = 1,
) -> jax.Array:
  """Sum of `loss_weights * nll` over a batch; differentiable.

  Args:
    unembed: `(trainable, frozen, hidden [b, c, d], per_token [b, c]) ->
      logits [b, c, v]`; a static, pure function.
    trainable: what of the head is trained; gradients flow to it.
    frozen: the rest of the head; no gradient.
    hidden: `[b, t, d]`; gradients flow to it.
    per_token: a tree of `[b, t]` arrays with `targets` and `loss_weights`
      (a `types.Batch`).
    vocab_size: v, which decides the size of a chunk.
    ways: see `chunk_size`.

  Returns:
    A float32 scalar; nats.
  """
  size = chunk_size(hidden.shape[0] * hidden.shape[1], vocab_size, ways)
  return _sum_chunks(
      unembed, trainable, chunks(hidden, size), frozen,
      chunks(per_token, size))


def _chunk_loss(unembed, trainable, hidden, frozen, per_token):
  logits = unembed(trainable, frozen, hidden, per_token)
  return jnp.sum(per_token.loss_weights * token_nll(logits, per_token.targets))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_chunks(unembed, trainable, hidden, frozen, per_token):
  def body(total, xs):
    return total + _chunk_loss(unembed, trainable, xs[0], frozen, xs[1]), None

  return jax.lax.scan(body, jnp.float32(0), (hidden, per_token))[0]


def _forward(unembed, trainable, hidden, frozen, per_token):
  grad = jax.value_and_grad(_chunk_loss, argnums=(1, 2))

  def body(carry, xs):
    total, grads = carry
    value, (d_trainable, d_hidden) = grad(
        unembed, trainable, xs[0], frozen, xs[1])
    grads = jax.tree.map(jnp.add, grads, d_trainable)
    return (total + value, grads), d_hidden

  start = jnp.float32(0), jax.tree.map(jnp.zeros_like, trainable)
  (total, d_trainable), d_hidden = jax.lax.scan(
      body, start, (hidden, per_token))
  return total, (d_trainable, d_hidden)


def _backward(unembed, residuals, g):
  del unembed
  d_trainable, d_hidden = jax.tree.map(
      lambda x: x * g.astype(x.dtype), residuals)
  return d_trainable, d_hidden, None, None


_sum_chunks.defvjp(_forward, _backward)
