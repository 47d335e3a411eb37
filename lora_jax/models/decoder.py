"""The decoder core: Llama's block with the options of its relatives.

  h = E[tokens]
  per layer:  a = h + o_proj(attention(q, k, v)),  q, k, v of norm(h)
              h = a + down_proj(act(gate_proj(x)) * up_proj(x)), x = norm(a)
  logits = head(norm(h))

With `post_norms`, what is added to h and to a is normed first. Options are
static: one that a model does not use is not in its program.

The layers are stacked and scanned over together with their adapters; every
projection is one call of `adapters.project`.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import adapters as adapters_lib
from lora_jax import keep as keep_lib
from lora_jax import struct
from lora_jax import trees
from lora_jax import types
from lora_jax.kernels import attention as attention_lib
from lora_jax.models import beside
from lora_jax.models import cache as cache_lib
from lora_jax.models import config as config_lib
from lora_jax.models import embedding
from lora_jax.models import frozen as frozen_lib
from lora_jax.models import layers as layers_lib
from lora_jax.models import rope
from lora_jax.models import sharding
from lora_jax.models import stream
from lora_jax.models import tiles
from lora_jax.quant import fp8

Linear = frozen_lib.Linear
Base = frozen_lib.Base
head_parts = frozen_lib.head_parts
combined = frozen_lib.combined


@struct.dataclass
class Context:
  """What all layers of one pass share; see `kernels.attention`.

  Attributes:
    cos, sin: `[b, t, p/2]` float32; see `rope.tables`.
    q_positions, q_segments: `[b, t]`.
    kv_positions, kv_segments: `[b, s]`, of the cached tokens; without a
      cache, or with an empty one, of the queries' own.
    local: cos and sin of the layers with a window, or None if they are the
      same.
    attention: static; what computes attention, and the layout of the rows.
    join: static; see `adapters.project_all`.
    mlp_tiles: static; see `tiles.over_tokens`.
  """

  cos: types.Array
  sin: types.Array
  q_positions: types.Array
  q_segments: types.Array
  kv_positions: types.Array
  kv_segments: types.Array
  local: tuple[types.Array, types.Array] | None = None
  attention: attention_lib.Options = struct.field(
      pytree_node=False, default=attention_lib.Options())
  join: bool = struct.field(pytree_node=False, default=False)
  mlp_tiles: int = struct.field(pytree_node=False, default=1)


def layer(
    config: config_lib.ModelConfig,
    context: Context,
    hidden: types.Array,
    weights: Mapping[str, Any],
    adapters: Mapping[str, Any],
    noise: adapters_lib.Noise | None = None,
    window: types.Array | None = None,
    cached: tuple[types.Array, types.Array] | None = None,
    keep: keep_lib.Keep = keep_lib.named,
) -> tuple[types.Array, tuple[types.Array, types.Array]]:
  """One block.

  Args:
    config: the model.
    context: of this pass.
    hidden: `[b, t, d]`.
    weights: this layer's part of `Base.layers`.
    adapters: this layer's part of `Adapters.layers`.
    noise: this layer's, or None.
    window: `[]`, or None.
    cached: this layer's keys and values `[b, k, s, e]` of earlier tokens, or
      None.
    keep: is given what `remat.NAMES` names.

  Returns:
    The next `[b, t, d]`, and the tokens' keys and values `[b, t, k, e]`.
  """
  b, t, _ = hidden.shape

  def project(x, *names, noise=noise, keep=keep, own=adapters):
    return _linears(
        x, [weights[name] for name in names],
        [own.get(name) for name in names],
        [None if noise is None else noise.for_target(name) for name in names],
        context.join, keep)

  def one(x, name, noise=noise):
    found, = project(x, name, noise=noise)
    return found

  block, mlp_block = adapters.get("self_attn"), adapters.get("mlp")

  def kept(name, y, keep=keep):
    """An output of `name`_proj, unless what it is made of is kept."""
    if adapters_lib.keeps_sum(adapters.get(f"{name}_proj"), noise):
      return y
    return keep(name, y)

  def norm(x, name):
    return layers_lib.rms_norm(
        x, _norm_scale(weights[name], adapters.get(name)), config.norm_eps,
        config.norm_offset, apart=context.join)

  def draw(name):
    return None if noise is None else noise.for_target(name)

  def heads(y, norm_name):
    y = y.reshape(b, t, -1, config.head_dim)
    return norm(y, norm_name) if config.qk_norm and norm_name else y

  cos, sin = context.cos, context.sin
  if context.local is not None and window is not None:
    local = window < config_lib.UNLIMITED
    cos, sin = (jnp.where(local, near, far) for near, far in zip(
        context.local, (cos, sin), strict=True))
  x = norm(hidden, "input_layernorm")
  q, k, v = project(x, "q_proj", "k_proj", "v_proj")
  q = rope.rotate(heads(q, "q_norm"), cos, sin)
  k = rope.rotate(heads(k, "k_norm"), cos, sin)
  v = heads(v, None)
  q, k, v = kept("q", q), kept("k", k), kept("v", v)
  where = (context.q_positions, context.kv_positions, context.q_segments,
           context.kv_segments, window)
  how: dict[str, Any] = dict(
      scale=config.attn_scale, softcap=config.attn_softcap)
  ahead = None if block is None else block.prefix()
  if ahead is not None:
    cached, where = cache_lib.with_prefix(ahead, cached, where, k)
  if cached is None:
    o = attention_lib.attention(
        q, k, v, *where, options=context.attention, keep=keep, **how)
  else:
    o = attention_lib.cached_attention(q, k, v, cached, *where, **how)
  if block is not None:
    scale = config.attn_scale
    # What an adapter projects are no tokens, for which noise is drawn.
    o = block.attended(
        q, o, lambda x, name: one(x, name, None),
        config.head_dim ** -0.5 if scale is None else scale)
  o = one(o.reshape(b, t, -1), "o_proj")
  if block is not None:
    o = block.residual(x, o, draw("self_attn"))
  if config.post_norms:
    o = norm(keep("o_out", o), "post_attention_layernorm")
  mid = keep("mid", hidden + o)
  x = norm(mid, "pre_feedforward_layernorm" if config.post_norms
           else "post_attention_layernorm")

  def mlp(keep, tokens, noise):
    x, known = tokens
    how = dict(noise=noise, keep=keep,
               own=adapters_lib.of_tokens(adapters, known))
    gate, up = project(x, "gate_proj", "up_proj", **how)
    gate, up = kept("gate", gate, keep), kept("up", up, keep)
    activate = layers_lib.ACTIVATIONS[config.activation]
    out, = project(activate(gate) * up, "down_proj", **how)
    if mlp_block is not None:
      out = mlp_block.residual(
          x, out, None if noise is None else noise.for_target("mlp"))
    return out

  out = tiles.over_tokens(
      mlp, (x, adapters_lib.by_token(adapters)), noise, context.mlp_tiles, keep)
  if config.post_norms:
    out = norm(keep("down_out", out), "post_feedforward_layernorm")
  return mid + out, (k, v)


def around(
    config: config_lib.ModelConfig,
    context: Context,
    carry: tuple[types.Array, types.Array | None],
    weights: Mapping[str, Any],
    adapters: Mapping[str, Any],
    noise: adapters_lib.Noise | None = None,
    window: types.Array | None = None,
    cached: tuple[types.Array, types.Array] | None = None,
    keep: keep_lib.Keep = keep_lib.named,
) -> tuple[tuple, tuple[types.Array, types.Array]]:
  """One block, and what an adapter of the whole of it does before and after.

  Args:
    config, context, weights, adapters, noise, window, cached, keep: see
      `layer`.
    carry: `[b, t, d]`, and the state beside it; see `beside`.

  Returns:
    The next carry, and the tokens' keys and values.
  """
  hidden, state = carry
  own = adapters.get("layer")
  if own is not None:
    hidden = own.entered(
        hidden, state, None if noise is None else noise.for_target("layer"))
  hidden, new = layer(
      config, context, hidden, weights, adapters, noise, window, cached, keep)
  if own is not None:
    state = own.left(keep("down_out", hidden), state)
  return (hidden, state), new


def _norm_scale(weight, adapter):
  return weight if adapter is None else adapter.merge(weight)


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
    mesh: Any = None,
    attention: attention_lib.Options = attention_lib.Options(),
    mlp_tiles: int = 1,
    spill: bool = False,
    frozen_matmul: str = "auto",
    state: types.Array | None = None,
) -> tuple[types.Array, cache_lib.Cache | None]:
  """Hidden states of a batch of rows, packed or padded, cached or not.

  Args:
    config: the model; static under `jit`.
    base: its frozen weights; layers in host memory come one at a time, see
      `stream`.
    adapters: what is trained beside them, or None; a first pass
      without them comes before it, if they are `guided`.
    tokens: `[b, t]` int.
    positions: `[b, t]` int, within the segment.
    segment_ids: `[b, t]` int, 0 on padding.
    noise: a training step's randomness; None is deterministic.
    cache: keys and values of the tokens before these, or None.
    dtype: of the activations.
    remat: what the backward pass keeps, a key of `remat.POLICIES`.
    mesh: devices over which each layer's weights are gathered where they are
      used (`sharding.gathered`); static. None leaves them where they are.
    attention: static; what computes attention, and what is known of the
      layout of the rows. With a cache, `single` says that it is empty.
    mlp_tiles: static; into how many tiles of tokens a row is cut for the MLP.
    spill: whether what the backward pass keeps is kept in host memory.
    frozen_matmul: static; in what the layers' frozen weights are multiplied, a
      key of `fp8.RECIPES`.
    state: what `beside.begun` gives, if it was asked.

  Returns:
    `[b, t, d]` after the final norm, in `dtype`, and the cache with these
    tokens appended (None without one).
  """
  adapters = adapters or adapters_lib.Adapters()
  if adapters_lib.is_guided(adapters):
    hidden, first = forward(
        config, base, adapters_lib.unguided(adapters), tokens, positions,
        segment_ids, cache=cache_lib.first(cache), dtype=dtype, mesh=mesh,
        attention=attention, mlp_tiles=mlp_tiles, frozen_matmul=frozen_matmul)
    adapters = adapters_lib.guided(adapters, hidden, noise)
    cache = cache and dataclasses.replace(cache, first=first)
  if adapters_lib.reader(adapters) is not None:
    if state is None:
      state, first = beside.begun(
          forward, config, base, adapters, tokens, positions, segment_ids,
          cache=cache, dtype=dtype, remat=remat, mesh=mesh,
          attention=attention, mlp_tiles=mlp_tiles, spill=spill)
      cache = cache and dataclasses.replace(cache, first=first)
    adapters = dataclasses.replace(adapters, shared=None)
  trained, frozen = _trained(adapters), base.layers
  base = combined(base, adapters)
  empty = cache is not None and attention.layout == "single"
  read = None if empty else cache
  kv_positions, kv_segments = positions, segment_ids
  if read is not None:
    kv_positions, kv_segments = read.positions, read.segment_ids
  windows = config.windows()
  capacity = None if cache is None else cache.capacity

  # Tokens stand after a prefix; only their turns show it.
  ahead = _prefix_length(adapters)

  def turns(which):
    return rope.tables(
        which, config.head_dim, positions + ahead, segment_ids,
        None if capacity is None else capacity + ahead)

  cos, sin = turns(config.rope)
  local = windows is not None and config.local_rope
  context = Context(
      cos=cos, sin=sin, q_positions=positions, q_segments=segment_ids,
      kv_positions=kv_positions, kv_segments=kv_segments,
      local=turns(local) if local else None,
      attention=dataclasses.replace(
          attention, windows=tuple(sorted(set(windows or ())))),
      join=_joins(dtype, mesh, cache),
      mlp_tiles=mlp_tiles)

  common, known = adapters_lib.split(adapters.shared)

  def body(shared, carry, xs, keep):
    context, noise, known, past = shared
    index, weights, layer_adapters, window, cached, common = xs
    if past is not None:
      cached = adapters_lib.layer(past, index)
    draw = None if noise is None else noise.at_layer(index)
    weights = sharding.housed(mesh, sharding.gathered(mesh, weights, dtype))
    weights = fp8.marked(weights, frozen_matmul, trained)
    layer_adapters = sharding.gathered(mesh, layer_adapters)
    common = adapters_lib.join(common, known)
    layer_adapters = {name: one.bound(common)
                      for name, one in layer_adapters.items()}
    if sharding.gathers(mesh):
      # The joint buffer would be cut as the norms of its columns are, and
      # gathered again, in floats.
      layer_adapters = {name: adapters_lib.without_constants(one)
                        for name, one in layer_adapters.items()}
    carry, new = around(
        config, context, carry, weights, layer_adapters, draw, window, cached,
        keep)
    return jax.tree.map(
        lambda x: sharding.rows(mesh, x), carry), cacheable(new)

  def cacheable(new):
    """What the scan stacks of a layer's keys and values."""
    if cache is None:
      return None
    slots = cache.positions.shape[1]
    return cache_lib.opened(new, slots, cache.k.dtype) if empty else new

  past = None if read is None else (read.k, read.v)

  def inputs(start, stop, weights, past):
    """What the scan over layers `start` to `stop` goes by."""
    own = adapters_lib.of_layers(adapters.layers, start, stop)
    return (
        jnp.arange(start, stop, dtype=jnp.int32), weights, own,
        None if windows is None else jnp.asarray(
            windows[start:stop], jnp.int32),
        past,
        # What all layers train has a gradient from each: a stack of copies.
        jax.tree.map(lambda x: jnp.broadcast_to(
            x, (stop - start, *x.shape)), common) if own else None)

  # Looked up where the parts of the table are, then exchanged: what is looked
  # up is less than the table.
  hidden = sharding.rows(
      mesh, embedding.embed(
          base.embed_tokens, adapters, tokens, dtype, config.embed_scale,
          noise, segment_ids), "requests", None, "model")
  carry = sharding.rows(mesh, hidden), state
  options: dict[str, Any] = dict(
      remat=remat, gathers=sharding.gathers(mesh), spill=spill)
  spans = adapters_lib.spans(adapters.layers, config.n_layers)
  if len(spans) == 1 and not config.layer_order:
    (hidden, _), new = stream.scan(
        body, (context, noise, known, None), carry,
        inputs(*spans[0], base.layers, past), **options)
  else:
    own = getattr(adapters.overrides, "layers", None)
    stacks = (None, trees.without(frozen, own), *[None] * 4)
    order = config.layer_order or tuple(range(config.n_layers))
    parts = []
    for start, stop in spans:
      weights = jax.tree.map(lambda x: x[start:stop], own)  # noqa: B023
      carry, new = stream.scan(
          body, (context, noise, known, past), carry,
          inputs(start, stop, weights, None), stacks=stacks,
          order=order[start:stop], **options)
      parts.append(new)
    (hidden, _), new = carry, jax.tree.map(
        lambda *x: jnp.concatenate(x), *parts)
  if read is not None:
    cache = cache_lib.append(read, new, positions, segment_ids)
  elif cache is not None:
    cache, _ = cache_lib.extend(cache, positions, segment_ids)
    cache = dataclasses.replace(cache, k=new[0], v=new[1])
  return layers_lib.rms_norm(
      hidden, _norm_scale(base.norm, adapters.outer.get("norm")),
      config.norm_eps, config.norm_offset), cache


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
  logits, = _linears(
      hidden, [head], [adapters_lib.module(adapters, "lm_head", None)], [draw])
  embedding = adapters.outer.get("embed_tokens")
  if config.tie_embeddings and embedding is not None:
    logits = embedding.tied_logits(hidden, logits)
  return layers_lib.soft_cap(
      logits.astype(jnp.float32), config.final_softcap)


def _trained(adapters):
  """Targets of the layers whose weights are trained themselves."""
  # A partial tree may lack the layers altogether.
  layers = getattr(adapters.overrides, "layers", None) or {}
  return {target for target, module in layers.items()
          if getattr(module, "weight", None) is not None}


def _prefix_length(adapters) -> int:
  """Keys before every segment's own."""
  block = adapters.layers.get("self_attn")
  if block is None:
    return 0
  block, *_ = next(adapters_lib.stacks(block))
  ahead = jax.eval_shape(
      jax.vmap(lambda one: one.bound(adapters.shared).prefix()), block)
  return 0 if ahead is None else ahead[0].shape[1]


def _joins(dtype, mesh, cache) -> bool:
  """Whether products of the same x are to be one.

  It saves passes over activations; decoding has few of them. Columns that are
  cut over devices would have to move to stand side by side.
  """
  return (jnp.dtype(dtype).itemsize == 2 and cache is None
          and (mesh is None or mesh.shape["tensor"] == 1))


def _linears(x, linears, adapters, noise, join=False, keep=keep_lib.named):
  found = adapters_lib.project_all(
      x, [one.weight for one in linears], adapters, noise, join, keep)
  biases = [one.bias if adapter is None else adapter.shift(one.bias)
            for one, adapter in zip(linears, adapters, strict=True)]
  return [y if bias is None else y + bias.astype(y.dtype)
          for y, bias in zip(found, biases, strict=True)]
