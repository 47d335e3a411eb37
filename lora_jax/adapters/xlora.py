"""X-LoRA: a classifier mixes LoRAs (Buehler and Buehler 2024, 2402.07148).

  h = x W0 + w sum_k g_k s_k dropout(x) A_k B_k
  g = softmax(MLP(z) / T)

with K experts A_k `[i, r]`, B_k `[r, o]`, s_k = alpha / r, of every projection
and one MLP (ReLU, `depth` layers) for all of them. It reads z `[b, t, d]`, the
hidden states after the final norm of a first pass without the experts, which
has no gradient. `layerwise` gives every projection a g of its own. Of the
largest `top` alone, and with `softmax_top` in a further softmax of these, g is
what it is in Hugging Face PEFT.

X-LoRA mixes LoRAs that are there: a folder names theirs, and trains the MLP
alone (`trainable=false`). A run that starts from nothing has fresh ones, A_k
as LoRA's and B_k = 0, so that h = x W0; frozen they would stay that, so that
they are trained by default. The MLP starts as torch's layers.

What is added depends on the whole row: it cannot be merged, and generation
holds a cache for each of the two passes.

Trainable parameters: K r (i + o) a matrix, if experts are trained; (d + 1) K
at depth 1, else (d + 1) c + (depth - 2) (c + 1) c + (c + 1) K, with c = `size`;
`layerwise` has K times the number of matrices in place of K.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from lora_jax import errors
from lora_jax import quant
from lora_jax import struct
from lora_jax import types
from lora_jax.adapters import base
from lora_jax.adapters import method
from lora_jax.adapters import xlora_classifier as classifier
from lora_jax.adapters import xlora_files


@struct.dataclass
class Experts(base.Adapter):
  """Attributes:

    a: `[K, i, r]`.
    b: `[K, r, o]`.
    scales: `[K]`, s_k.
    rates: `[K]`, dropout rates.
    ranks: `[K]` int32, r of each; what is wider is not used.
    rank: `[]` int32, the largest of them (0: not adapted).
    number: `[]` int32, which projection of the model this is.
    gates: `[b, t, K]`, w g, while it is used.
  """

  a: types.Array = base.trained("in", None)
  b: types.Array = base.up(None, "out")
  scales: types.Array = base.frozen(None)
  rates: types.Array = base.frozen(None)
  ranks: types.Array = base.frozen(None)
  rank: types.Array = base.frozen()
  number: types.Array = base.frozen()
  gates: types.Array = base.frozen("batch", None, None, default=None)

  guided = True

  @property
  def rate(self) -> types.Array:
    """The largest."""
    return self.rates.max(-1)

  def with_rate(self, rate):
    return dataclasses.replace(self, rates=jnp.full_like(self.rates, rate))

  def bound(self, shared):
    # In the second pass what is shared is gone, in the first not yet made.
    if shared is None or isinstance(shared, classifier.Classifier):
      return self
    where = self.number if shared.shape[-2] > 1 else 0
    return dataclasses.replace(self, gates=jnp.take(
        shared, where, axis=-2, mode="clip"))

  def by_token(self):
    return self.gates

  def of_tokens(self, known):
    return dataclasses.replace(self, gates=known)

  def apply(self, x, weight, noise=None):
    y, dtype = quant.matmul(x, weight), x.dtype
    used = self.scales[:, None] * (
        jnp.arange(self.a.shape[-1]) < self.ranks[:, None])
    if noise is None:
      h = jnp.einsum("...i,kir->...kr", x, self.a.astype(dtype))
    else:
      h = jnp.stack([
          noise.for_target(f"expert.{k}").dropout(x, rate) @ a.astype(dtype)
          for k, (a, rate) in enumerate(zip(self.a, self.rates, strict=True))],
                    -2)
    h = h * (self.gates[..., None] * self.active(used, 0.0)).astype(dtype)
    return y + jnp.einsum("...kr,kro->...o", h, self.b.astype(dtype))

  def merge(self, weight):
    del weight
    raise errors.UserError(
        "X-LoRA weighs its experts by what the model makes of a row, and is "
        "no weight: it cannot be merged (use --format=peft)")

  def size(self) -> int:
    return int(self.ranks.sum()) * (self.a.shape[-2] + self.b.shape[-1])


@struct.dataclass
class FrozenExperts(Experts):
  """`Experts` that are not trained."""

  a: types.Array = base.frozen("in", None)
  b: types.Array = base.frozen(None, "out")

  def size(self) -> int:
    return 0


def kind(slot: base.Slot) -> type[Experts]:
  """Which of the two the options ask for."""
  return Experts if slot.options.trainable else FrozenExperts


def init(key, weight, slot, shared=None):
  """The adapter of one module before the first step; see `starts`."""
  del shared
  (i, o), experts = weight.shape[-2:], slot.options.experts
  pairs = [slot.start.draw(k, i, o, slot.width, slot.rank)
           for k in jax.random.split(key, experts)]
  a, b = (jnp.stack(x) for x in zip(*pairs, strict=True))
  each = {name: jnp.broadcast_to(value, experts) for name, value in (
      ("scales", slot.scale), ("rates", slot.rate), ("ranks", slot.rank))}
  return kind(slot)(a=a, b=b, **each, rank=slot.rank,
                    number=jnp.asarray(slot.number, jnp.int32))


METHOD = method.Method(
    summary="h = x W0 + (alpha/r) sum_k g_k x A_k B_k, g of the base's last "
            "hidden states",
    paper="arXiv 2402.07148", adapter=Experts, init=init, kind=kind,
    count="experts * r * (i + o) if trainable else 0",
    share=classifier.share, count_shared=classifier.COUNT,
    options=classifier.Options, patterns=True, mergeable=False,
    zero_gradients=("a", *classifier.TRAINED),
    tiny={"targets": "q_proj,up_proj,down_proj", "options": {
        "experts": 3, "depth": 3, "size": 8, "layerwise": True, "top": 2}},
    form=xlora_files.form({True: Experts, False: FrozenExperts}))
