"""The decoder core: Llama's block with the options of its relatives.

  h = E[tokens]
  per layer:  a = h + o_proj(attention(q, k, v)),  q, k, v of norm(h)
              h = a + down_proj(silu(gate_proj(x)) * up_proj(x)), x = norm(a)
  logits = head(norm(h))

The layers are stacked and scanned over together with their adapters; every
projection is one call of `adapters.project`.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from flax import struct
import jax
from jax import ad_checkpoint
import jax.numpy as jnp

from lora_jax import adapters as adapters_lib
from lora_jax import trees
from lora_jax import types
from lora_jax.models import cache as cache_lib
from lora_jax.models import config as config_lib
from lora_jax.models import layers as layers_lib
from lora_jax.models import remat as remat_lib
from lora_jax.models import rope

_name = ad_checkpoint.checkpoint_name


@struct.dataclass
class Linear:
  """A frozen projection.

  Attributes:
    weight: `[i, o]`, an array or a `quant.QuantizedArray`; `[l, i, o]` when
      stacked.
    bias: `[o]` (`[l, o]`), or None.
  """

  weight: Any
  bias: types.Array | None = None


@struct.dataclass
class Base:
  """A frozen model.

  Attributes:
    embed_tokens: `[v, d]`.
    layers: by Hugging Face's module name without parents: `Linear`s for
      q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, and
      arrays for input_layernorm, post_attention_layernorm `[l, d]`, q_norm,
      k_norm `[l, e]` (if `config.qk_norm`).
    norm: `[d]`, before the head.
    lm_head: a `Linear` `[d, v]`, or None if it is the embedding transposed.
  """

  embed_tokens: types.Array
  layers: dict[str, Any]
  norm: types.Array
  lm_head: Linear | None = None


@struct.dataclass
class Context:
  """What all layers of one pass share; see `layers.attention`.

  Attributes:
    cos, sin: `[b, t, e/2]` float32.
    q_positions, q_segments: `[b, t]`.
    kv_positions, kv_segments: `[b, s]`; s is t without a cache.
    slots: `[b, t]`, where in the cache the tokens go, or None.
  """

  cos: types.Array
  sin: types.Array
  q_positions: types.Array
  q_segments: types.Array
  kv_positions: types.Array
  kv_segments: types.Array
  slots: types.Array | None = None


def layer(
    config: config_lib.ModelConfig,
    context: Context,
    hidden: types.Array,
    weights: Mapping[str, Any],
    adapters: Mapping[str, Any],
    noise: adapters_lib.Noise | None = None,
    window: types.Array | None = None,
    cached: tuple[types.Array, types.Array] | None = None,
) -> tuple[types.Array, tuple[types.Array, types.Array] | None]:
  """One block.

  Args:
    config: the model.
    context: of this pass.
    hidden: `[b, t, d]`.
    weights: this layer's part of `Base.layers`.
    adapters: this layer's part of `Adapters.layers`.
    noise: this layer's, or None.
    window: `[]`, or None.
    cached: this layer's keys and values `[b, s, k, e]`, or None.

  Returns:
    The next `[b, t, d]`, and the updated keys and values, or None.
  """
  b, t, _ = hidden.shape

  def project(x, name):
    draw = None if noise is None else noise.for_target(name)
    return _linear(x, weights[name], adapters.get(name), draw)

  def heads(x, name, norm_name):
    y = project(x, name).reshape(b, t, -1, config.head_dim)
    if config.qk_norm and norm_name:
      y = layers_lib.rms_norm(y, weights[norm_name], config.norm_eps)
    return y

  x = layers_lib.rms_norm(
      hidden, weights["input_layernorm"], config.norm_eps)
  q = rope.rotate(heads(x, "q_proj", "q_norm"), context.cos, context.sin)
  k = rope.rotate(heads(x, "k_proj", "k_norm"), context.cos, context.sin)
  v = heads(x, "v_proj", None)
  q, k, v = _name(q, "q"), _name(k, "k"), _name(v, "v")
  if cached is not None and context.slots is not None:
    cached = cache_lib.write(cached, (k, v), context.slots)
    k, v = (c.astype(q.dtype) for c in cached)
  o = layers_lib.attention(
      q, k, v, context.q_positions, context.kv_positions,
      context.q_segments, context.kv_segments, window)
  o = _name(o.reshape(b, t, -1), "o")
  mid = _name(hidden + project(o, "o_proj"), "mid")
  x = layers_lib.rms_norm(
      mid, weights["post_attention_layernorm"], config.norm_eps)
  gate = _name(project(x, "gate_proj"), "gate")
  up = _name(project(x, "up_proj"), "up")
  return mid + project(jax.nn.silu(gate) * up, "down_proj"), cached


def forward(
    config: config_lib.ModelConfig,
    base: Base,
    adapters: adapters_lib.Adapters | None,
    tokens: types.Array,
    positions: types.Array,
    segment_ids: types.Array,
    *,
    noise: adapters_lib.Noise | None = None,
    cache: cache_lib.Cache | None = None,
    dtype: Any = jnp.float32,
    remat: str = "none",
) -> tuple[types.Array, cache_lib.Cache | None]:
  """Hidden states of a batch of rows, packed or padded, cached or not.

  Args:
    config: the model; static under `jit`.
    base: its frozen weights.
    adapters: what is trained beside them, or None.
    tokens: `[b, t]` int.
    positions: `[b, t]` int, within the segment.
    segment_ids: `[b, t]` int, 0 on padding.
    noise: a training step's randomness; None is deterministic.
    cache: keys and values of the tokens before these, or None.
    dtype: of the activations.
    remat: what the backward pass keeps, a key of `remat.POLICIES`.

  Returns:
    `[b, t, d]` after the final norm, in `dtype`, and the cache with these
    tokens appended (None without one).
  """
  adapters = adapters or adapters_lib.Adapters()
  base = combined(base, adapters)
  if cache is None:
    kv_positions, kv_segments, slots = positions, segment_ids, None
  else:
    cache, slots = cache_lib.extend(cache, positions, segment_ids)
    kv_positions, kv_segments = cache.positions, cache.segment_ids
  cos, sin = rope.tables(config.rope, config.head_dim, positions)
  context = Context(
      cos=cos, sin=sin, q_positions=positions, q_segments=segment_ids,
      kv_positions=kv_positions, kv_segments=kv_segments, slots=slots)

  def body(hidden, xs):
    index, weights, layer_adapters, window, cached = xs
    draw = None if noise is None else noise.at_layer(index)
    return layer(config, context, hidden, weights, layer_adapters, draw,
                 window, cached)

  windows = config.windows()
  xs = (
      jnp.arange(config.n_layers, dtype=jnp.int32),
      base.layers,
      adapters.layers,
      None if windows is None else jnp.asarray(windows, jnp.int32),
      None if cache is None else (cache.k, cache.v),
  )
  hidden, cached = jax.lax.scan(
      remat_lib.wrap(body, remat), _embed(base, adapters, tokens, dtype), xs)
  if cache is not None:
    cache = dataclasses.replace(cache, k=cached[0], v=cached[1])
  return layers_lib.rms_norm(hidden, base.norm, config.norm_eps), cache


def unembed(
    config: config_lib.ModelConfig,
    base: Base,
    adapters: adapters_lib.Adapters | None,
    hidden: types.Array,
    noise: adapters_lib.Noise | None = None,
) -> types.Array:
  """Logits `[..., v]` float32 of `forward`'s hidden states `[..., d]`.

  Args:
    config: the model.
    base: its frozen weights.
    adapters: what is trained beside them, or None.
    hidden: `[..., d]`; any part of the rows, so that a loss can go by chunks.
    noise: its ids and positions belong to `hidden`'s rows; None is
      deterministic.
  """
  adapters = adapters or adapters_lib.Adapters()
  base = combined(base, adapters)
  head = base.lm_head
  if config.tie_embeddings:
    head = Linear(weight=base.embed_tokens.T)
  draw = None if noise is None else noise.for_target("lm_head")
  logits = _linear(hidden, head, adapters.outer.get("lm_head"), draw)
  embedding = adapters.outer.get("embed_tokens")
  if config.tie_embeddings and embedding is not None:
    logits = embedding.tied_logits(hidden, logits)
  return logits.astype(jnp.float32)


def combined(base: Base, adapters: adapters_lib.Adapters | None) -> Base:
  """The base with the weights that `adapters` trains in their places."""
  if adapters is None or adapters.overrides is None:
    return base
  return trees.combine(adapters.overrides, base)


def _embed(base, adapters, tokens, dtype):
  adapter = adapters.outer.get("embed_tokens")
  if adapter is not None:
    return adapter.lookup(tokens, base.embed_tokens).astype(dtype)
  # Rows first: casting the table would cost a second one.
  return jnp.take(base.embed_tokens, tokens, axis=0).astype(dtype)


def _linear(x, linear, adapter, noise):
  y = adapters_lib.project(x, linear.weight, adapter, noise)
  return y if linear.bias is None else y + linear.bias.astype(y.dtype)
