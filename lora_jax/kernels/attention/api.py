"""The one entry point of attention, and the choice of what computes it."""

from __future__ import annotations

from typing import Any

from absl import logging
import jax.numpy as jnp

from lora_jax import errors
from lora_jax import keep as keep_lib
from lora_jax import types
from lora_jax.kernels.attention import base
from lora_jax.kernels.attention import cudnn
from lora_jax.kernels.attention import plain
from lora_jax.kernels.attention import splash
from lora_jax.kernels.attention import tokamax

IMPLEMENTATIONS: dict[str, Any] = {
    "plain": plain,
    "cudnn": cudnn,
    "tokamax": tokamax,
    "splash": splash,
}
CHOICES = {"auto": None, **IMPLEMENTATIONS}

# What auto tries before plain, in order. On an H100 tokamax takes 1.26 ms for
# whole rows (4 x 2048, 32 heads on 8, with backward) and cuDNN 1.39; with
# several segments a row cuDNN needs a mask in memory: 1.24 and 3.51.
PREFERRED: dict[str, tuple[str, ...]] = {
    "any": (),
    "packed": ("splash", "tokamax", "cudnn"),
    "single": ("splash", "tokamax", "cudnn"),
}

# What computes all that `vmap` adds at once; the others were not tried.
MAPPED = ("cudnn",)


def attention(
    q: types.Array,
    k: types.Array,
    v: types.Array,
    q_positions: types.Array,
    kv_positions: types.Array,
    q_segments: types.Array,
    kv_segments: types.Array,
    window: types.Array | int | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    options: base.Options = base.Options(),
    keep: keep_lib.Keep = keep_lib.named,
) -> types.Array:
  """Grouped-query attention; query head n reads kv head n // (h / k).

  It takes positions and segments, not a mask, and what the caller knows about
  their layout, so that a kernel need not build the mask.

  Args:
    q: `[b, t, h, e]`.
    k: `[b, s, k, e]`.
    v: `[b, s, k, e]`.
    q_positions: `[b, t]`; see `plain.visible`.
    kv_positions: `[b, s]`.
    q_segments: `[b, t]`.
    kv_segments: `[b, s]`.
    window: see `plain.visible`.
    scale: of the logits; `e ** -0.5` by default.
    softcap: logits become `softcap * tanh(logits / softcap)`; None is off.
    options: what computes it, and the layout of rows.
    keep: is given "o", the output, and what else the backward pass reads.

  Returns:
    `[b, t, h, e]` in `q.dtype`; the softmax is float32. Rows that see no
    key (padding) are finite and mean nothing.

  Raises:
    errors.UsageError: an implementation that was asked for by name cannot
      compute this; `auto` always can.
  """
  call = base.Call(
      q, k, v, q_positions, kv_positions, q_segments, kv_segments, window,
      scale, softcap, options, keep)
  module = chosen(call)
  out = module.run(call)
  # Some hand on more than their output, and by themselves.
  return out if module in (cudnn, tokamax) else keep("o", out)


def chosen(call: base.Call) -> Any:
  """The module that computes a call; see `attention`."""
  name = call.options.implementation
  errors.choose("attention layout", call.options.layout, base.LAYOUTS)
  module = errors.choose("compute.attention", name, CHOICES)
  if module is None:
    return _automatic(call)
  if reason := module.refuses(call):
    raise errors.UsageError(
        f'compute.attention="{name}" cannot compute this: {reason}; use '
        '"auto", which takes what can')
  return module


def _automatic(call):
  # Results in float32 are to be exact, decoding has nothing to tile, and no
  # kernel is for CPUs.
  if (call.q.dtype == jnp.float32 or call.q.shape[1] == 1
      or call.device.platform == "cpu"):
    return plain
  for name in PREFERRED[call.options.layout]:
    if call.options.mapped and name not in MAPPED:
      continue
    reason = IMPLEMENTATIONS[name].refuses(call)
    if reason is None:
      return IMPLEMENTATIONS[name]
    logging.debug("attention: not %s: %s", name, reason)
  return plain
