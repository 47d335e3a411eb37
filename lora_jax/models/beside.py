"""A small decoder beside a model, which reads its input first.

  embeddings -> n layers like the model's -> norm -> state [b, t, d]
  state, hidden -> layer -> state, hidden -> layer ...

It is what all layers of a method's adapters share, and `reads_first`:

  layers        stacked `[n, ...]`, as `Base.layers`
  norm          `[d']`
  embed_tokens  `[v, d']`, or None: it reads the model's own
  heads         static; 0: as many as the model has
  auxiliary     static; how often its own loss is added in training
  begun         from its hidden states to the state beside the model's

What the state does is said by the hooks `entered` and `left` of adapters of
whole layers. Its keys and values are in `Cache.first`.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any

from lora_jax import adapters as adapters_lib
from lora_jax import types
from lora_jax.models import cache as cache_lib
from lora_jax.models import config as config_lib
from lora_jax.models import frozen as frozen_lib


def model(
    config: config_lib.ModelConfig, adapters: adapters_lib.Adapters | None
) -> config_lib.ModelConfig | None:
  """The small decoder's config; None where there is none.

  Args:
    config: the model's; what the weights' shapes do not say is as there.
    adapters: whole tree, or None.
  """
  own = None if adapters is None else adapters_lib.reader(adapters)
  if own is None:
    return None
  n, d = own.layers["input_layernorm"].shape
  queries, keys, f = (own.layers[name].weight.shape[-1]
                      for name in ("q_proj", "k_proj", "gate_proj"))
  h = own.heads or config.n_heads
  windows = config.window_layers
  if windows is not None:
    windows = (*windows, *[windows[-1]] * n)[:n]
  return dataclasses.replace(
      config, n_layers=n, d_model=d, d_ff=f, n_heads=h,
      n_kv_heads=keys * h // queries, head_dim=queries // h,
      embed_scale=config.embed_scale and d ** 0.5, window_layers=windows,
      layer_order=())


def begun(
    forward: Callable,
    config: config_lib.ModelConfig,
    base: frozen_lib.Base,
    adapters: adapters_lib.Adapters,
    tokens: types.Array,
    positions: types.Array,
    segment_ids: types.Array,
    *,
    cache: cache_lib.Cache | None = None,
    **options: Any,
) -> tuple[types.Array | None, cache_lib.Cache | None]:
  """(the first layer's state `[b, t, d]`, the small decoder's cache), or None
  twice if the adapters have no such decoder.

  Args:
    forward: `decoder.forward`.
    config: the model.
    base: its frozen weights.
    adapters: whole tree.
    tokens, positions, segment_ids: `[b, t]`.
    cache: the model's, or None.
    **options: of `forward`.
  """
  own = adapters_lib.reader(adapters)
  if own is None:
    return None, None
  base = frozen_lib.combined(base, adapters)
  # Tokens whose rows are trained are so in what it reads, too.
  table, outer = own.embed_tokens, {}
  if table is None:
    table = base.embed_tokens
    outer = {name: one for name, one in adapters.outer.items()
             if name == "embed_tokens"}
  small = dataclasses.replace(
      base, embed_tokens=table, layers=own.layers, norm=own.norm, lm_head=None)
  hidden, cache = forward(
      model(config, adapters), small, adapters_lib.Adapters(outer=outer),
      tokens, positions, segment_ids, cache=cache_lib.first(cache), **options)
  return own.begun(hidden), cache
