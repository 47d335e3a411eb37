"""cuDNN's flash attention, through `jax.nn.dot_product_attention`.

Its public interface has no segments. Rows of one segment use its causal mask;
what else is asked gets a mask in memory, which is as exact and costs 2.5
times as much (H100, 4 rows of 2048, 32 heads on 8: 0.32 ms forward, 1.46 ms
with backward; masked 0.89 and 3.57).

Causal rows are given without their lengths: padding comes after the last
token that counts, so nothing sees it, and each padding query sees at least
itself, so that even an empty row is finite.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from lora_jax import types
from lora_jax.kernels.attention import base
from lora_jax.kernels.attention import plain
from lora_jax.kernels.attention import rows


def causal(call: base.Call) -> bool:
  """Whether a call needs no mask in memory."""
  return (call.options.layout == "single" and base.unaligned(call) is None
          and call.windows is not None)


def refuses(call: base.Call) -> str | None:
  """See `base`; the limits are those that jax checks, and cuDNN's own."""
  capability = base.compute_capability(call.device)
  if capability is None or capability < (8, 0):
    return "it needs an NVIDIA GPU of compute capability 8.0 or more"
  if call.q.dtype not in (jnp.bfloat16, jnp.float16):
    return f"it computes in bfloat16 or float16, not {call.q.dtype}"
  if call.softcap is not None:
    return "it has no soft cap of the logits"
  e, widest = call.q.shape[-1], 256 if capability >= (9, 0) else 128
  if e % 8 or e > widest:
    return (f"a head must be a multiple of 8, of at most {widest}, wide; it "
            f"is {e}")
  if not causal(call) and (call.q.shape[1] % 2 or call.k.shape[1] % 2):
    return "with a mask, the numbers of queries and keys must be even"
  return base.unshardable(call)


def run(call: base.Call) -> types.Array:
  """See `attend`."""
  return attend(call, "cudnn")


def attend(call: base.Call, name: Literal["cudnn", "xla"]) -> types.Array:
  """Causal where the layout allows it, else with a mask in memory.

  Args:
    call: what to compute.
    name: which of jax's implementations; `xla` is for tests, and keeps what
      a pullback of many small operations keeps.
  """
  mesh = call.options.mesh
  k, v = call.aligned() if causal(call) else (call.k, call.v)
  # jax cuts cuDNN's call itself, if its operands are cut alike.
  operands = [base.placed(mesh, x, base.HEADS) for x in (call.q, k, v)]
  attention = functools.partial(
      jax.nn.dot_product_attention, scale=call.scale, implementation=name)
  if causal(call):
    def chosen(window):
      return functools.partial(
          attention, is_causal=True,
          local_window_size=None if window is None else (window - 1, 0))
  else:
    operands.append(base.placed(
        mesh, plain.mask(call), ("batch", None, None, None)))

    def chosen(window):
      del window
      return lambda q, k, v, mask: attention(q, k, v, mask=mask)

  def each(run):
    return base.each_window(call, run) if causal(call) else run(None)

  found = call.keep("o", each(
      lambda window: rows.forward(chosen(window), operands)))
  return each(lambda window: rows.attached(chosen(window), operands, found))
