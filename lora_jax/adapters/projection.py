"""`project(x, weight, adapter)`: every projection of a model is one call."""

from __future__ import annotations

from collections.abc import Sequence

from lora_jax import keep as keep_lib
from lora_jax import quant
from lora_jax import types
from lora_jax.adapters import base
from lora_jax.adapters import noise as noise_lib
from lora_jax.quant import fp8
from lora_jax.quant import fp8_joint


def project(
    x: types.Array,
    weight: types.Tree,
    adapter: base.Adapter | None = None,
    noise: noise_lib.Noise | None = None,
) -> types.Array:
  """`x [..., i]` through a frozen, perhaps quantised, adapted weight.

  Args:
    x: `[..., i]`.
    weight: `[i, o]`, an array or a `quant.QuantizedArray`.
    adapter: this projection's adapter, or None.
    noise: randomness of a training step; None is deterministic.

  Returns:
    `[..., o]` in `x.dtype`, without the bias.
  """
  if adapter is None:
    return quant.matmul(x, weight)
  return adapter.apply(x, weight, noise)


def project_all(
    x: types.Array,
    weights: Sequence[types.Tree],
    adapters: Sequence[base.Adapter | None],
    noise: Sequence[noise_lib.Noise | None],
    join: bool = False,
    keep: keep_lib.Keep = keep_lib.named,
) -> list[types.Array]:
  """`project` for projections that read the same x.

  Args:
    x: `[..., i]`.
    weights, adapters, noise: of each projection.
    join: whether low-rank products may be part of the frozen ones, where a
      method has `factors`: they then cost next to nothing. Those in 8 bits
      share x's rounding, adapted or not.
    keep: is given x A, "low", where they are, and what a method's gradient
      reads.

  Returns:
    A `[..., o]` for each.
  """
  def finished(k, y, cross=None):
    adapter = adapters[k]
    if adapter is None:
      return y
    if adapter.finishes:
      y = keep(base.PRODUCT, y)
    return adapter.finish(y, weights[k], cross, keep)

  found: dict[int, types.Array] = {}
  if join:
    found |= {k: finished(k, y) for k, y in _in_float8(
        x, weights, adapters, noise, keep).items()}
  joined = []

  for k, (adapter, draw) in enumerate(zip(adapters, noise, strict=True)):
    if (join and k not in found and adapter is not None and draw is None
        and not isinstance(weights[k], fp8.InFloat8)):
      factors = adapter.factors()
      if factors is not None:
        joined.append((k, adapter, factors))
  if joined:
    pairs = quant.joint_matmul(
        x, [weights[k] for k, *_ in joined], [pair for *_, pair in joined],
        keep, any(adapter.reads_cross for _, adapter, _ in joined))
    for (k, *_), (y, cross) in zip(joined, pairs, strict=True):
      found[k] = finished(k, y, cross)
  for k, one in enumerate(zip(weights, adapters, noise, strict=True)):
    weight, adapter, draw = one
    if k in found:
      continue
    if adapter is not None and keeps_sum(adapter, draw):
      found[k] = finished(k, quant.matmul(x, weight) + adapter.down_up(x))
    else:
      found[k] = project(x, *one)
  return [found[k] for k in range(len(weights))]


def keeps_sum(
    adapter: base.Adapter | None, noise: noise_lib.Noise | None) -> bool:
  """Whether the backward pass keeps a sum that the adapted product is made of
  element by element, so that it need not keep the product, too."""
  return adapter is not None and adapter.finishes and noise is None


def _in_float8(x, weights, adapters, noise, keep):
  """By index, those of `project_all` that are products in 8 bits together."""
  factors = {}
  for k, (adapter, draw) in enumerate(zip(adapters, noise, strict=True)):
    added = None if adapter is None else adapter.factors()
    if adapter is None or (added is not None and draw is None):
      factors[k] = added
  found: dict[int, types.Array] = {}
  known = list(factors)
  for group in fp8_joint.together(
      x, [weights[k] for k in known], list(factors.values())):
    group = [known[n] for n in group]
    found |= zip(group, fp8_joint.matmul(
        x, [weights[k] for k in group], [factors[k] for k in group], keep),
                 strict=True)
  return found
