"""Prefix tuning (Li and Liang 2021, arXiv 2101.00190).

  softmax over [P_k, k] of q, values [P_v, v], in every layer

with n trained keys P_k and values P_v `[n, k, e]` a layer. Every segment of a
packed row sees the prefix, whose keys are not rotated; tokens stand at
positions n, n + 1, ... With `projection` the prefix is trained through

  [P_k, P_v] = tanh(E W1 + b1) W2 + b2

with E `[n, k e]`, W1 `[k e, c]` and b1 `[c]` of all layers, W2 `[c, 2 k e]` and
b2 of each; files hold what comes out. P-tuning v2 (arXiv 2110.07602) is the
same with a longer prefix. E and P start at N(0, 1), W and b at torch's
U(-c^-1/2, c^-1/2) for c inputs.

Trainable parameters: 2 n k e a layer; with `projection` 2 (c + 1) k e a layer,
and n k e + (k e + 1) c.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import errors
from lora_jax import struct
from lora_jax import types
from lora_jax.adapters import base
from lora_jax.adapters import config as config_lib
from lora_jax.adapters import method


def check_tokens(tokens: int) -> None:
  """Raises a UsageError for a number of virtual tokens that cannot be."""
  if not 1 <= tokens <= 4096:
    raise errors.UsageError(
        f"adapter.options.tokens={tokens} is out of range; use an integer "
        "from 1 to 4096")


def check_hidden(hidden: int) -> None:
  """Raises a UsageError for a width of an encoder that cannot be."""
  if not 0 <= hidden <= 65536:
    raise errors.UsageError(
        f"adapter.options.hidden={hidden} is out of range; use an integer "
        "from 1 to 65536, or 0 for as many as the encoder's inputs")


def uniform(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
  """Where torch starts weights and biases of a layer with that many inputs."""
  bound = fan_in ** -0.5
  return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


@dataclasses.dataclass(frozen=True)
class Options:
  """Attributes:

    tokens: n.
    projection: whether the prefix is trained through the two layers.
    hidden: c; 0 is k e.
    zero: whether P starts at zero.
  """

  tokens: int = 20
  projection: bool = False
  hidden: int = 0
  zero: bool = False

  def validate(self) -> None:
    check_tokens(self.tokens)
    check_hidden(self.hidden)


@dataclasses.dataclass(frozen=True)
class LongOptions(Options):
  """`Options` of P-tuning v2."""

  tokens: int = 128


@struct.dataclass
class Prefix(base.Adapter):
  """Attributes:

    keys, values: `[n, k, e]`.
    rank: `[]` int32.
  """

  keys: types.Array = base.trained(None, "heads", None)
  values: types.Array = base.trained(None, "heads", None)
  rank: types.Array = base.frozen()

  def prefix(self):
    return self.keys, self.values, self.rank > 0


@struct.dataclass
class Encoder(base.Adapter):
  """What all layers' prefixes are made of.

  Attributes:
    embedding: E `[n, k e]`.
    w, b: W1 `[k e, c]`, b1 `[c]`.
  """

  embedding: types.Array = base.trained(None, None)
  w: types.Array = base.trained(None, None)
  b: types.Array = base.trained(None)

  def hidden(self) -> jax.Array:
    """`[n, c]`."""
    return jnp.tanh(self.b + jnp.matmul(
        self.embedding, self.w, precision="highest"))


@struct.dataclass
class Projected(base.Adapter):
  """The last layer of the encoder, of one layer of the model.

  Attributes:
    w, b: W2 `[2, c, k, e]` (keys, values) and b2 `[2, k, e]`.
    rank: `[]` int32.
  """

  w: types.Array = base.trained(None, "heads", None)
  b: types.Array = base.trained("heads", None)
  rank: types.Array = base.frozen()

  def bound(self, shared):
    return self.folded(shared)

  def folded(self, shared):
    pair = self.b[:, None] + jnp.einsum(
        "nc,pcke->pnke", shared.hidden(), self.w, precision="highest")
    return Prefix(keys=pair[0], values=pair[1], rank=self.rank)


def share(key, modules):
  """E, W1 and b1 of a prefix that is trained through them, or None."""
  options, geometry = modules.options, modules.geometry
  if not options.projection:
    return None
  i = geometry.k * geometry.e
  c = options.hidden or i
  first, second, third = jax.random.split(key, 3)
  return Encoder(
      embedding=jax.random.normal(first, (options.tokens, i)),
      w=uniform(second, (i, c), i), b=uniform(third, (c,), i))


def kind(slot: base.Slot) -> type[base.Adapter]:
  """Which of the two the options ask for."""
  return Projected if slot.options.projection else Prefix


def init(key, weight, slot, shared=None):
  """The adapter of one layer before the first step."""
  del weight
  g, options = slot.geometry, slot.options
  first, second = jax.random.split(key)
  by = 0.0 if options.zero else 1.0
  if not options.projection:
    shape = (options.tokens, g.k, g.e)
    return Prefix(
        keys=by * jax.random.normal(first, shape),
        values=by * jax.random.normal(second, shape), rank=slot.rank)
  c = shared.w.shape[1]
  return Projected(
      w=by * uniform(first, (2, c, g.k, g.e), c),
      b=by * uniform(second, (2, g.k, g.e), c), rank=slot.rank)


def _config(config: config_lib.AdapterConfig) -> dict[str, Any]:
  options = config.options
  return {"num_virtual_tokens": options.tokens,
          "prefix_projection": options.projection,
          "encoder_hidden_size": options.hidden or None,
          "init_weights": "zero" if options.zero else None}


def _block(config: Mapping[str, Any]) -> dict[str, Any]:
  # The file holds the prefix itself, whatever it was trained through.
  return {"options": {"tokens": int(config["num_virtual_tokens"])}}


def tensors_of(adapters: base.Adapters) -> dict[str, Any]:
  """PEFT's `[n, 2 l k e]`: layer by layer the keys, then the values."""
  stack = adapters.layers["self_attn"]
  if not (stack.rank > 0).all():
    raise errors.UserError(
        "PEFT's files have a prefix in every layer, and this adapter lacks it "
        "in some; leave adapter.layers empty")
  one = jax.jit(jax.vmap(lambda a: a.folded(adapters.shared)))(stack)
  pair = jnp.stack([one.keys, one.values], 1)  # [l, 2, n, k, e]
  n = pair.shape[2]
  return {"prompt_embeddings": jnp.moveaxis(pair, 2, 0).reshape(n, -1)}


def adapters_of(tensors, config, geometry) -> base.Adapters:
  g = geometry
  flat = jnp.asarray(tensors["prompt_embeddings"], jnp.float32)
  pair = jnp.moveaxis(
      flat.reshape(config.options.tokens, g.l, 2, g.k, g.e), 0, 2)
  return base.Adapters(layers={"self_attn": Prefix(
      keys=pair[:, 0], values=pair[:, 1], rank=jnp.ones(g.l, jnp.int32))})


def _method(paper, options, same_as=""):
  return method.Method(
      summary="attention over [P_k, k] and [P_v, v]", paper=paper,
      adapter=Prefix, init=init, kind=kind, share=share,
      count="2 * (hidden or k * e) * k * e + 2 * k * e if projection "
            "else 2 * tokens * k * e",
      count_shared="tokens * k * e + (k * e + 1) * (hidden or k * e) "
                   "if projection else 0",
      options=options, targets="self_attn", sites=("self_attn",),
      ranked=False, identity_at_init=False, mergeable=False,
      tiny={"options": {"tokens": 3}},
      form=method.Form(
          peft_type="PREFIX_TUNING", config=_config, block=_block,
          same_as=same_as, lists_targets=False, tensors=tensors_of,
          adapters=adapters_of))


METHOD = _method("arXiv 2101.00190", Options)
P_TUNING_V2 = _method("arXiv 2110.07602", LongOptions, "prefix")
