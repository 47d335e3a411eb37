"""Lily: A and B that layers share, and a router (Zhong et al., 2407.09946).

  h = x W0 + s (x A) sum_e p_e B_e        p = mean(softmax(x A R))

A `[i, r]` is one for n = `stride_A` successive adapted layers of a target, the
K = `num_B` matrices B_e `[r, o]` are one set for all of them, the router R
`[r, K]` is each layer's. B starts at zero, A and R where torch starts linear
layers, s is `scaling`.

The mean is over all tokens that are computed together, those of other examples
and of padding among them, as in Hugging Face PEFT. What this adds therefore
depends on the batch: on how examples are packed and cut into micro-batches, on
which rows are evaluated or answered together, and on later tokens, which a
training step sees. Decoding from a cache averages over the batch's new tokens
only, so that it is not what the whole text would give; PEFT's does the same.
The loss makes logits of a few tokens at a time, hence no head is adapted.

Trainable parameters: r K a matrix, and r (i m/n + K o) a target of m layers
(m/n rounded up).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import errors
from lora_jax import quant
from lora_jax import struct
from lora_jax import types
from lora_jax.adapters import base
from lora_jax.adapters import config as config_lib
from lora_jax.adapters import method
from lora_jax.adapters import prefix


@dataclasses.dataclass(frozen=True)
class Options:
  """Attributes:

    stride_A: n, adapted layers that share an A.
    num_B: K.
    scaling: s.
  """

  stride_A: int = 1
  num_B: int = 2
  scaling: float = 1.0

  def validate(self) -> None:
    """Raises a `UsageError` if a value is out of range."""
    for name, least in (("stride_A", 1), ("num_B", 2)):
      value = getattr(self, name)
      if not least <= value <= 4096:
        raise errors.UsageError(
            f"adapter.options.{name}={value} is out of range; use an integer "
            f"from {least} to 4096")


@struct.dataclass
class Pool(base.Adapter):
  """What the layers of one target share.

  Attributes:
    a: `[m / n, i, r]`.
    b: `[K, r, o]`.
  """

  a: types.Array = base.trained("in", None)
  b: types.Array = base.up(None, "out")

  def to_peft(self, embedding=False):
    return {}  # PEFT's files have it in every module.


@struct.dataclass
class Lily(base.Adapter):
  """Attributes:

    router: `[r, K]`, R.
    scale: `[]`, s.
    rank: `[]` int32, 0: not adapted.
    turn: `[]` int32, which of the target's adapted layers this is.
    stride: n; static.
    target: of the pool; static.
    a, b: `[i, r]` and `[K, r, o]`, while it is used; see `Pool`.
  """

  router: types.Array = base.trained(None, None)
  scale: types.Array = base.frozen()
  rank: types.Array = base.frozen()
  turn: types.Array = base.frozen()
  stride: int = base.static(default=1)
  target: str = base.static(default="")
  a: types.Array = base.frozen(default=None)
  b: types.Array = base.frozen(default=None)

  def bound(self, shared):
    pool = shared[self.target]
    return dataclasses.replace(
        self, a=pool.a[self.turn // self.stride], b=pool.b)

  def weights(self, h: types.Array) -> jax.Array:
    """p `[K]` float32 of x A `[..., r]`."""
    logits = jnp.matmul(
        h, self.router.astype(h.dtype), preferred_element_type=jnp.float32)
    return jax.nn.softmax(logits).reshape(-1, logits.shape[-1]).mean(0)

  def apply(self, x, weight, noise=None):
    del noise
    h = x @ self.a.astype(x.dtype)
    b = jnp.einsum("e,ero->ro", self.weights(h), self.b, precision="highest")
    b = self.active(self.scale * b, 0.0)
    return quant.matmul(x, weight) + h @ b.astype(x.dtype)

  def merge(self, weight):
    del weight
    raise errors.UserError(
        "Lily weighs its matrices by what it is given, and is no weight: it "
        "cannot be merged (use --format=peft), nor stand before a method that "
        "needs the weight itself")

  def to_peft(self, embedding=False):
    return {"lily_A.weight": self.a.T,
            "lily_B.weight": self.b.reshape(-1, self.b.shape[-1]),
            "lily_router.weight": self.router.T}

  @classmethod
  def from_peft(cls, tensors, slot):
    return _adapter(
        jnp.asarray(tensors["lily_router.weight"], jnp.float32).T, slot)


def _adapter(router, slot) -> Lily:
  return Lily(
      router=router, turn=jnp.int32(slot.turn), target=slot.target,
      stride=slot.options.stride_A, **slot.values("scale", "rank"))


def _layers(ranks: Mapping[str, Sequence[int]]) -> list[int] | None:
  """The layers that are adapted; None for all.

  Raises:
    errors.UsageError: if they are not the same for all targets.
  """
  found = {tuple(np.flatnonzero(one).tolist()) for one in ranks.values()}
  if len(found) > 1:
    raise errors.UsageError(
        "adapter.targets: PEFT's files of Lily name layers for all targets "
        "together, and here they are in different ones; choose whole targets, "
        "and layers by adapter.layers")
  layers, = found
  return None if len(layers) == len(next(iter(ranks.values()))) else [*layers]


def share(key, modules):
  """A and B by target, before the first step."""
  _layers(modules.ranks)
  options, r, found = modules.options, modules.width, {}
  keys = jax.random.split(key, len(modules.shapes))
  for own, (target, (i, o)) in zip(keys, modules.shapes.items(), strict=True):
    adapted = sum(rank > 0 for rank in modules.ranks[target])
    found[target] = Pool(
        a=prefix.uniform(own, (-(-adapted // options.stride_A), i, r), i),
        b=jnp.zeros((options.num_B, r, o)))
  return found


def init(key, weight, slot, shared=None):
  """The adapter of one module before the first step."""
  del weight, shared
  r = slot.width
  return _adapter(prefix.uniform(key, (r, slot.options.num_B), r), slot)


def _config(config: config_lib.AdapterConfig) -> dict[str, Any]:
  return dataclasses.asdict(config.options) | {
      "r": config.rank, "init_weights": True}


def _block(config: Mapping[str, Any]) -> dict[str, Any]:
  targets = config.get("target_modules")
  if isinstance(targets, str):
    raise errors.UsageError(
        f"target_modules={targets!r}: by a regular expression PEFT shares A "
        "and B among all targets of one shape, which is not read here; save "
        "the adapter with a list of names")
  return {"rank": int(config["r"]), "options": method.named(Options, config)}


def _places(ranks: Mapping[str, list[int]]) -> dict[str, Any]:
  """PEFT shares among what one name of `target_modules` matches, so that these
  are not to be paths."""
  layers = _layers(ranks)
  if layers is None:
    return {}
  return {"target_modules": sorted(ranks), "layers_to_transform": layers}


def _shared(tensors, config, modules):
  """The pools of a file, which has them under every module.

  Raises:
    errors.UserError: if modules do not share as they should, or the file is of
      another base.
  """
  del tensors
  options, r, found = config.options, config.rank, {}
  names = ("lily_A.weight", "lily_B.weight")
  for target, present in modules.tensors.items():
    i, o = modules.shapes[target]
    expected = dict(zip(names, ((r, i), (options.num_B * r, o)), strict=True))
    adapted = [module for module in present if module is not None]
    leaders = adapted[::options.stride_A]
    for turn, module in enumerate(adapted):
      for name, first in zip(
          names, (leaders[turn // options.stride_A], adapted[0]), strict=True):
        if module[name].shape != expected[name]:
          raise errors.UserError(
              f"{name} of a {target} has shape {module[name].shape}, this "
              f"model needs {expected[name]}; the adapter was made for another "
              "base")
        if not np.array_equal(module[name], first[name]):
          raise errors.UserError(
              f"{name} of {target} {turn} (from 0) is not that of the module "
              f"it should share with by stride_A={options.stride_A}; save the "
              "adapter with whole names in target_modules, not paths")
    found[target] = Pool(
        a=jnp.stack([jnp.asarray(module[names[0]], jnp.float32).T
                     for module in leaders]),
        b=jnp.asarray(adapted[0][names[1]], jnp.float32).reshape(
            options.num_B, r, o))
  return found


METHOD = method.Method(
    summary="h = x W0 + s x A sum_e p_e B_e, p = mean(softmax(x A R)), "
            "A and B of several layers",
    paper="arXiv 2407.09946", adapter=Lily, init=init,
    count="num_B * r + (i * r if turn % stride_A == 0 else 0) "
          "+ (num_B * r * o if turn == 0 else 0)",
    options=Options, scale=lambda alpha, r, options: options.scaling,
    mergeable=False, zero_gradients=("a", "router"), share=share,
    mixes_tokens=True,
    tiny={"options": {"stride_A": 2, "num_B": 3, "scaling": 2.0}},
    form=method.Form(
        peft_type="LILY", config=_config, block=_block, places=_places,
        shared=_shared))
