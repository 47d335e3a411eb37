"""DeepMind's tokamax: packed rows and windows without a mask in memory.

Its mask takes, for every query, the first key it may see. In packed rows this
is the start of the query's segment, or of its window if that is later, and
the window may be traced. H100, 4 rows of 2048 with 6 segments each, 32 heads
on 8: 0.18 ms forward, 1.24 ms with backward; of one segment 0.29 and 1.26.

It is optional: the extra `cuda` installs it where Python >= 3.12. On GPUs its
Mosaic kernels run; elsewhere its XLA implementation, which is as slow as the
plain path and serves to test this one.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
import importlib.util
import logging
import sys
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import types
from lora_jax.kernels.attention import base

WIDEST = 256  # Of a head; wider ones are not tested.


@functools.cache
def installed() -> bool:
  """Whether tokamax can be imported."""
  return (sys.version_info >= (3, 12)
          and importlib.util.find_spec("tokamax") is not None)


def refuses(call: base.Call) -> str | None:
  """See `base`."""
  if not installed():
    return ('tokamax is not installed; pip install "lora_jax[cuda]" on '
            "Python 3.12 or later")
  if reason := base.unaligned(call):
    return reason
  platform = call.device.platform
  if platform == "tpu":
    return "its TPU kernel has no segments; splash does"
  if platform != "cpu":
    capability = base.compute_capability(call.device)
    if capability is None or capability[0] not in (9, 10):
      return "its kernels need an NVIDIA Hopper or Blackwell GPU"
    # In float16 its backward pass gave NaN for rows of 24 (0.0.17, H100).
    if call.q.dtype != jnp.bfloat16:
      return f"it computes in bfloat16, not {call.q.dtype}"
    e = call.q.shape[-1]
    if e % 8 or e > WIDEST:
      return (f"a head must be a multiple of 8, of at most {WIDEST}, wide; "
              f"it is {e}")
  return base.unshardable(call)


def first_keys(call: base.Call) -> types.Array | None:
  """Index of the first key each query sees, `[b, t]`; None if that is 0."""
  b, t = call.q.shape[:2]
  first = None
  if call.options.layout == "packed":
    first = base.starts(call.q_segments)
  if call.window is not None:
    index = jnp.arange(t, dtype=jnp.int32)
    seen = jnp.maximum(index - (call.window - 1), 0)[None]
    first = jnp.maximum(seen, 0 if first is None else first)
    first = jnp.broadcast_to(first, (b, t))
  return first


def run(call: base.Call) -> types.Array:
  """Mosaic on a GPU, XLA elsewhere."""
  return attend(call, "xla" if call.device.platform == "cpu" else "mosaic_gpu")


@functools.cache
def _hush() -> None:
  """Its kernels are not tuned here, which it says whenever one is compiled."""
  logging.getLogger("absl").addFilter(
      lambda record: not str(record.msg).startswith("Autotuning cache miss"))


def attend(call: base.Call, name: str) -> types.Array:
  """The call by the op that tokamax calls by this name."""
  # Its public function takes no such mask, and the public classes of its ops
  # are beside others that import jax_triton.
  from tokamax._src.ops.attention import api
  from tokamax._src.ops.attention import base as tokamax_base

  _hush()
  op = api.IMPLEMENTATIONS[name]

  def options(first):
    seen = tokamax_base.Mask(
        k_start=None if first is None else first[:, None], is_causal=True)
    scale = {} if call.scale is None else {"logits_scale": call.scale}
    return {"mask": seen, "logits_soft_cap": call.softcap} | scale

  rows = first_keys(call)
  rows = () if rows is None else (rows,)
  operands = (call.q, *call.aligned(), *rows)
  axes = [*[base.HEADS] * 3, *[base.TOKENS] * len(rows)]
  sharded = functools.partial(base.sharded, call.options.mesh)
  if op.vjp is None:

    def plain(q, k, v, first=None):
      return op(q, k, v, **options(first))

    return call.keep("o", sharded(plain, *operands, axes=axes))

  def forward(q, k, v, first=None):
    return op(q, k, v, return_residuals=True, **options(first))

  # What the backward pass reads is computed apart from it, so that it need
  # not be twice: by itself the op runs its forward kernel again for the sums
  # of the softmax, `[b, h, t]`, whatever a policy keeps.
  out, sums = call.keep("o", sharded(
      forward, *map(jax.lax.stop_gradient, operands), axes=axes,
      out=(base.HEADS, base.SUMS)))

  def attached(q, k, v, out, sums, first=None):
    return _attached(op, options)(q, k, v, first, out, sums)

  return sharded(
      attached, *operands[:3], out, sums, *rows,
      axes=[*axes[:3], base.HEADS, base.SUMS, *axes[3:]])


def _attached(op: Any, options: Callable[..., dict[str, Any]]) -> Callable:
  """`out` of (q, k, v, first, out, sums), with the op's gradient."""

  @jax.custom_vjp
  def run(q, k, v, first, out, sums):
    return out

  def forward(q, k, v, first, out, sums):
    return out, (q, k, v, first, out, sums)

  def backward(kept, g):
    q, k, v, first, out, sums = kept
    bound = op.bind(q, k, v, **options(first))
    rest = {name: value for name, value in bound.kwargs.items()
            if name != "return_residuals"}
    grads = op.vjp(sums, out, g, *bound.args, **rest)
    # The op gives (gradients, None) or gradients, by argument.
    grads = grads[0] if isinstance(grads, tuple) else grads
    return grads["q"], grads["k"], grads["v"], None, None, None

  run.defvjp(forward, backward)
  return run
