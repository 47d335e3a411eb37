"""ShadowPEFT (Li et al. 2026, arXiv 2604.19254): a small decoder goes beside.

  s_0 = shadow(E)                            E: the model's embeddings
  h'  = h + alpha dropout(h - s) D U         what layer l is given for h
  s'  = (1 - g) s + g t                      what layer l + 1 is given for s
  t   = gelu(y T1 + a1) T2 + a2              y: what layer l puts out for h'
  g   = sigmoid(gelu(y G1 + c1) G2 + c2)

in every layer, with D `[d, r]`, U `[r, d]`, T1 and G1 `[d, u]`, T2 and G2
`[u, d]` (u = `update`, or r). The shadow has `layers` layers and a norm like
the model's. Its own loss, of the model's head on s_0, is added `auxiliary`
times in training (PEFT leaves out the cap that Gemma 2's head has). U starts at
zero, so that h' = h; D, T and G start as torch's layers, the shadow as
transformers': N(0, 0.02^2), biases 0. T and G of the last layer change nothing;
they are there because PEFT's files have them.

Source: equations 2 to 9 as `peft.tuners.shadow` of PEFT 0.21.2 has them. What
is added depends on the whole row: it cannot be merged, and generation holds a
cache for the shadow, too. PEFT's shadows of other widths, which have a table
of their own and a projection to the model's width, are read; new ones are as
wide as the model.

Trainable parameters: 2 d r + 2 (2 d u + u + d) a layer, and the shadow's
`layers` p + d, with p those of one of the model's layers.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import errors
from lora_jax import mesh as mesh_lib
from lora_jax import struct
from lora_jax import types
from lora_jax.adapters import base
from lora_jax.adapters import config as config_lib
from lora_jax.adapters import method
from lora_jax.adapters import pieces

# Names in PEFT's files, of the adapter that it calls "default".
BACKBONE, PROJECTION = "shadow_backbone.default", "shadow_projection.default"
UPDATES = {"t": "shadow_update_transform.default",
           "g": "shadow_update_gate.default"}
# Shapes `[o, i]` of projections and `[o]` of norms; q: h e, k: k e.
SHAPES = {
    "q_proj": "qd", "k_proj": "kd", "v_proj": "kd", "o_proj": "dq",
    "gate_proj": "fd", "up_proj": "fd", "down_proj": "df",
    "input_layernorm": "d", "post_attention_layernorm": "d",
    "pre_feedforward_layernorm": "d", "post_feedforward_layernorm": "d",
    "q_norm": "e", "k_norm": "e"}


@dataclasses.dataclass(frozen=True)
class Options:
  """Attributes:

    layers: of the shadow.
    update: u; 0 is r.
    strength: alpha.
    auxiliary: weight of the shadow's own loss; 0 is none.
    heads: of a shadow that was read; 0 is as many as the model has.
  """

  layers: int = 1
  update: int = 0
  strength: float = 0.1
  auxiliary: float = 0.05
  heads: int = 0

  def validate(self) -> None:
    """Raises a `UsageError` if a value is out of range."""
    for name, low, high in (
        ("layers", 1, 256), ("update", 0, 65536), ("heads", 0, 1024)):
      if not low <= getattr(self, name) <= high:
        raise errors.UsageError(
            f"adapter.options.{name}={getattr(self, name)} is out of range; "
            f"use an integer from {low} to {high}")
    if not self.auxiliary >= 0:
      raise errors.UsageError(
          f"adapter.options.auxiliary={self.auxiliary} is out of range; use a "
          "weight of at least 0")


@struct.dataclass
class Projection:
  """One of the shadow's, stacked.

  Attributes:
    weight: `[n, i, o]`.
    bias: `[n, o]`, or None.
  """

  weight: types.Array = mesh_lib.axes("in", "out")
  bias: types.Array | None = mesh_lib.axes("out", default=None)


@struct.dataclass
class Shadow(base.Adapter):
  """The decoder beside the model; see `models.beside`.

  Attributes:
    layers: `Projection`s, and norms `[n, d']`, by target.
    norm: `[d']`.
    embed_tokens: `[v, d']`, or None.
    projection: `[d', d]`, or None.
    heads: static; 0: as many as the model has.
    auxiliary: static; weight of its loss.
    parts, fused: static, of `base.Geometry`.
  """

  layers: dict[str, Any] = base.trained()
  norm: types.Array = base.trained(None)
  embed_tokens: types.Array = base.trained(None, None, default=None)
  projection: types.Array = base.trained(None, None, default=None)
  heads: int = base.static(default=0)
  auxiliary: float = base.static(default=0.0)
  parts: tuple = base.static(default=())
  fused: tuple = base.static(default=())

  reads_first = True

  def begun(self, hidden):
    if self.projection is None:
      return hidden
    return hidden @ self.projection.astype(hidden.dtype)

  def to_peft(self, embedding=False):
    del embedding
    found = {f"{BACKBONE}.norm.weight": self.norm}
    if self.embed_tokens is not None:
      found[f"{BACKBONE}.embed_tokens.weight"] = self.embed_tokens
    if self.projection is not None:
      found[f"{PROJECTION}.weight"] = self.projection.T
    for layer in range(len(self.layers["input_layernorm"])):
      one = {(target, leaf): self._tensor(target, leaf, layer)
             for target, _, leaf in self.parts}
      for path, names, leaf in modules(self.parts, self.fused):
        found[f"{BACKBONE}.layers.{layer}.{path}.{leaf}"] = np.concatenate(
            [one[name, leaf] for name in names])
    return found

  def _tensor(self, target, leaf, layer):
    """A parameter of one layer, `[o, i]` or `[o]`."""
    found = self.layers[target]
    if isinstance(found, Projection):
      found = getattr(found, leaf)
    # A norm's `[n, d']` has no second axis to exchange.
    return found[layer].T


@struct.dataclass
class ShadowLayer(base.Adapter):
  """What is done to one layer's input and to the state beside it.

  Attributes:
    down, up: D `[d, r]`, U `[r, d]`.
    t_in, t_in_bias, t_out, t_out_bias: T1 `[d, u]`, a1, T2 `[u, d]`, a2.
    g_in, g_in_bias, g_out, g_out_bias: G1, c1, G2, c2.
    scale: `[]`, alpha.
    rate: `[]`, dropout rate.
    rank: `[]` int32, 0: not adapted.
  """

  down: types.Array = base.trained(None, None)
  up: types.Array = base.up(None, None)
  t_in: types.Array = base.trained(None, None)
  t_in_bias: types.Array = base.trained(None)
  t_out: types.Array = base.trained(None, None)
  t_out_bias: types.Array = base.trained(None)
  g_in: types.Array = base.trained(None, None)
  g_in_bias: types.Array = base.trained(None)
  g_out: types.Array = base.trained(None, None)
  g_out_bias: types.Array = base.trained(None)
  scale: types.Array = base.frozen()
  rate: types.Array = base.frozen()
  rank: types.Array = base.frozen()

  def entered(self, hidden, state, noise=None):
    dtype, apart = hidden.dtype, hidden - state
    if noise is not None:
      apart = noise.dropout(apart, self.rate)
    added = apart @ self.down.astype(dtype) @ self.up.astype(dtype)
    return hidden + self.active(self.scale, 0.0).astype(dtype) * added

  def left(self, hidden, state):
    g = self.active(jax.nn.sigmoid(self._mlp("g", hidden)), 0)
    return (1 - g) * state + g * self._mlp("t", hidden)

  def _mlp(self, name, x):
    def linear(x, place):
      w, b = (getattr(self, f"{name}_{place}{leaf}").astype(x.dtype)
              for leaf in ("", "_bias"))
      return x @ w + b

    return linear(jax.nn.gelu(linear(x, "in"), approximate=False), "out")

  def to_peft(self, embedding=False):
    found = {"shadow_down.default.weight": self.down.T,
             "shadow_up.default.weight": self.up.T}
    for name, (path, transposed) in _updates().items():
      value = getattr(self, name)
      found[path] = value.T if transposed else value
    return found

  @classmethod
  def from_peft(cls, tensors, slot):
    updates = {
        name: jnp.asarray(
            tensors[path].T if transposed else tensors[path], jnp.float32)
        for name, (path, transposed) in _updates().items()}
    down, up = (jnp.asarray(tensors[f"shadow_{name}.default.weight"].T,
                            jnp.float32) for name in ("down", "up"))
    return cls(down=down, up=up, **updates, **slot.values())

  @classmethod
  def peft_rank(cls, tensors):
    return tensors["shadow_down.default.weight"].shape[0]


def _updates() -> dict[str, tuple[str, bool]]:
  """Names in PEFT's files, and whether they are transposed there."""
  return {
      f"{mlp}_{place}{suffix}": (f"{path}.{number}.{leaf}", not suffix)
      for mlp, path in UPDATES.items()
      for place, number in (("in", 0), ("out", 2))
      for suffix, leaf in (("", "weight"), ("_bias", "bias"))}


def modules(parts: tuple, fused: tuple) -> list[tuple[str, list[str], str]]:
  """(path, the targets that it holds, leaf) of what a layer has in a file."""
  found: dict[tuple[str, str], list[str]] = {}
  for target, path, leaf in parts:
    for whole, targets in fused:
      path = whole if target in targets else path
    found.setdefault((path, leaf), []).append(target)
  return [(path, names, leaf) for (path, leaf), names in found.items()]


def stacked(
    leaves: Mapping[tuple[str, str], types.Array]) -> dict[str, Any]:
  """`Shadow.layers` of stacks `[n, i, o]` and `[n, o]` by target and leaf."""
  return {
      target: Projection(
          weight=value, bias=leaves.get((target, "bias")))
      if len(SHAPES[target]) == 2 else value
      for (target, leaf), value in leaves.items() if leaf == "weight"}


def share(key, modules):
  """The shadow before the first step.

  Raises:
    errors.UsageError: if it is to be of another width.
  """
  options, g = modules.options, modules.geometry
  if options.heads:
    raise errors.UsageError(
        f"adapter.options.heads={options.heads}: a new shadow has as many "
        "heads as the model; leave it at 0")
  sizes = {"d": g.d, "f": g.f, "q": g.h * g.e, "k": g.k * g.e, "e": g.e}
  leaves: dict[tuple[str, str], types.Array] = {}
  for number, (target, _, leaf) in enumerate(g.parts):
    o, *i = (sizes[letter] for letter in SHAPES[target])
    if leaf == "bias":
      value = jnp.zeros((options.layers, o))
    elif i:
      value = 0.02 * jax.random.normal(
          jax.random.fold_in(key, number), (options.layers, *i, o))
    else:
      value = jnp.full((options.layers, o), g.norm)
    leaves[target, leaf] = value
  return Shadow(
      layers=stacked(leaves), norm=jnp.full(g.d, g.norm),
      auxiliary=options.auxiliary, parts=g.parts, fused=g.fused)


def init(key, weight, slot, shared=None):
  """The adapter of one layer before the first step."""
  del weight, shared
  d, r = slot.geometry.d, slot.width
  u = slot.options.update or r
  keys = iter(jax.random.split(key, 9))
  draw = lambda fan, *shape: pieces.uniform(next(keys), shape, fan)
  updates: dict[str, jax.Array] = {}
  for name in UPDATES:
    updates |= {
        f"{name}_in": draw(d, d, u), f"{name}_in_bias": draw(d, u),
        f"{name}_out": draw(u, u, d), f"{name}_out_bias": draw(u, d)}
  return ShadowLayer(
      down=draw(d, d, r), up=jnp.zeros((r, d)), **updates, **slot.values())


def read(
    tensors: Mapping[str, types.Array], config: config_lib.AdapterConfig,
    of: method.Modules,
) -> Shadow:
  """The shadow of a file, whose shapes say how wide it is.

  Raises:
    KeyError: for what is missing.
    errors.UserError: for what does not fit together.
  """
  options, g = config.options, of.geometry
  assert g is not None  # Whoever reads a file knows the model.
  rest = dict(tensors)

  def take(name):
    return np.asarray(rest.pop(name), np.float32)

  norm = take(f"{BACKBONE}.norm.weight")
  heads, d = options.heads or g.h, norm.shape[0]
  like = f"{BACKBONE}.layers.0.mlp.down_proj.weight"
  sizes = {"d": d, "f": tensors[like].shape[1], "q": g.h * g.e,
           "k": g.k * g.e, "e": g.e}
  if not g.fused:
    for letter, name in (("q", "q_proj"), ("k", "k_proj")):
      place = f"{BACKBONE}.layers.0.self_attn.{name}.weight"
      sizes[letter] = tensors[place].shape[0]
    sizes["e"] = sizes["q"] // heads
  found: dict[tuple[str, str], list] = {}
  for layer in range(options.layers):
    for path, names, leaf in modules(g.parts, g.fused):
      name = f"{BACKBONE}.layers.{layer}.{path}.{leaf}"
      value, rows = take(name), [sizes[SHAPES[n][0]] for n in names]
      columns = [sizes[letter] for letter in SHAPES[names[0]][1:]]
      wanted = (sum(rows), *(columns if leaf == "weight" else ()))
      _check(name, value, wanted)
      for target, part in zip(
          names, np.split(value, np.cumsum(rows)[:-1]), strict=True):
        found.setdefault((target, leaf), []).append(
            part.T if part.ndim == 2 else part)
  table, projection = f"{BACKBONE}.embed_tokens.weight", f"{PROJECTION}.weight"
  own = take(table) if table in rest else None
  last = take(projection) if d != g.d or projection in rest else None
  if own is None and d != g.d:
    raise KeyError(table)
  for name, value, wanted in (
      (table, own, (g.v, d)), (projection, last, (g.d, d))):
    if value is not None:
      _check(name, value, wanted)
  if rest:
    raise errors.UserError(
        f"{min(rest)} is no part of a shadow of {options.layers} layers beside "
        "this model; use one that was trained for causal language modelling "
        "on the same base")
  return Shadow(
      layers=stacked({key: np.stack(parts) for key, parts in found.items()}),
      norm=norm, embed_tokens=own, projection=None if last is None else last.T,
      heads=options.heads, auxiliary=options.auxiliary, parts=g.parts,
      fused=g.fused)


def _check(name, value, wanted) -> None:
  if value.shape != wanted:
    raise errors.UserError(
        f"{name} has shape {value.shape}, a shadow beside this model needs "
        f"{wanted}; the adapter was made for another base")


def _config(config: config_lib.AdapterConfig) -> dict[str, Any]:
  options = config.options
  return {
      "r": config.rank, "shadow_alpha": options.strength,
      "shadow_dropout": float(config.dropout), "init_weights": True,
      "shadow_model": "mirror", "shadow_num_hidden_layers": options.layers,
      "shadow_hidden_size": None, "shadow_intermediate_size": None,
      "shadow_num_attention_heads": options.heads or None,
      "share_embeddings": True, "update_hidden_size": options.update or None,
      "auxiliary_loss_weight": options.auxiliary}


def _block(config: Mapping[str, Any]) -> dict[str, Any]:
  if config.get("shadow_model", "mirror") != "mirror":
    raise errors.UsageError(
        f"shadow_model={config['shadow_model']!r} is a network of its own "
        "kind, and only one of the model's kind is read; train it again with "
        'shadow_model="mirror"')
  return {
      "rank": int(config.get("r", 8)),
      "dropout": float(config.get("shadow_dropout") or 0.0),
      "options": {
          "layers": config.get("shadow_num_hidden_layers") or 1,
          "update": config.get("update_hidden_size") or 0,
          "strength": float(config.get("shadow_alpha", 0.1)),
          "auxiliary": float(config.get("auxiliary_loss_weight", 0.05)),
          "heads": config.get("shadow_num_attention_heads") or 0}}


def _places(ranks: Mapping[str, list[int]]) -> dict[str, Any]:
  found = np.flatnonzero(ranks["layer"])
  if found[-1] - found[0] + 1 != len(found):
    raise errors.UserError(
        "PEFT's shadow goes from one layer to the next, and this adapter "
        "leaves layers between others out; choose adapter.layers without gaps")
  return {"target_modules": [f"model.layers.{layer}" for layer in found]}


METHOD = method.Method(
    summary="h' = h + alpha (h - s) D U before every layer, s of a small "
            "decoder beside the model",
    paper="arXiv 2604.19254", adapter=ShadowLayer, init=init,
    count="2 * d * r + 2 * (2 * d * (update or r) + (update or r) + d)",
    share=share, count_shared="layers * p + d", options=Options,
    targets=r".*\.layers\.\d+", sites=("layer",),
    scale=lambda alpha, r, options: options.strength, mergeable=False,
    carried=tuple(_updates()), zero_gradients=("down", *_updates()),
    tiny={"options": {"layers": 2, "update": 6, "strength": 0.5}},
    form=method.Form(
        peft_type="SHADOW", config=_config, block=_block, lists_targets=False,
        places=_places, shared=read))
