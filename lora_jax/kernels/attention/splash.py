"""Splash attention, the TPU kernel that comes with jax.

It takes segments and static windows, skips blocks that the causal mask or the
window hides, and reads keys and values of grouped heads once.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from lora_jax import types
from lora_jax.kernels.attention import base

TILE = 128  # Rows are padded to a multiple of it.
LARGEST = 512  # Of a block, if the row is a multiple of it.


def refuses(call: base.Call) -> str | None:
  """See `base`."""
  if call.device.platform != "tpu":
    return "it runs on TPUs"
  if call.q.dtype not in (jnp.bfloat16, jnp.float32):
    return f"it computes in bfloat16 or float32, not {call.q.dtype}"
  if reason := base.unaligned(call):
    return reason
  if call.windows is None:
    return "the values of a traced window are not known"
  return base.unshardable(call)


def run(call: base.Call) -> types.Array:
  """Segments only if rows have several."""
  return attend(call)


def attend(call: base.Call, *, interpret: bool = False) -> types.Array:
  """The call by the kernel, or (for tests) by Pallas's interpreter."""
  packed = call.options.layout == "packed"
  rows = (call.q_segments.astype(jnp.int32),) if packed else ()
  scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale

  def with_window(window):
    kernel = functools.partial(
        _rows, scale=scale, softcap=call.softcap, window=window,
        interpret=interpret)
    return base.sharded(
        call.options.mesh, kernel, call.q, *call.aligned(), *rows,
        axes=(*[base.HEADS] * 3, *[base.TOKENS] * len(rows)))

  return base.each_window(call, with_window)


def _rows(q, k, v, segments=None, *, scale, softcap, window, interpret):
  """`[b, t, h, e]` on one device."""
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  t, h = q.shape[1:3]
  length = -(-t // TILE) * TILE
  # Padded keys come after every query that counts.
  q, k, v = (
      jnp.pad(x, ((0, 0), (0, length - t), (0, 0), (0, 0))).swapaxes(1, 2)
      for x in (q * jnp.asarray(scale, q.dtype), k, v))
  shape = (length, length)
  seen = (splash.CausalMask(shape) if window is None
          else splash.LocalMask(shape, (window - 1, 0), offset=0))
  block = next(n for n in (LARGEST, 256, TILE) if length % n == 0)
  kernel = splash.make_splash_mha(
      splash.MultiHeadMask([seen] * h),
      block_sizes=splash.BlockSizes(
          block_q=block, block_kv=block, block_q_dkv=block,
          block_kv_dkv=block, block_q_dq=block, block_kv_dq=block),
      head_shards=1, q_seq_shards=1, attn_logits_soft_cap=softcap,
      interpret=interpret)
  if segments is None:
    out = jax.vmap(kernel)(q, k, v)
  else:
    segments = jnp.pad(segments, ((0, 0), (0, length - t)))
    out = jax.vmap(kernel)(
        q, k, v, splash.SegmentIds(q=segments, kv=segments))
  return out.swapaxes(1, 2)[:, :t]
