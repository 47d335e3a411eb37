"""Uni-LoRA: all low-rank factors out of one vector (Li et al., 2506.00799).

  h = x W0 + dropout(x) A B
  (A_1, B_1, A_2, ...) = P theta,   P_kj = 1 / sqrt(n_j) for one j of each k

so that every entry of all A `[i, r]` and B `[r, o]` is one of theta's d, over
the root of how often that is used, n_j; P is an isometry. Every j has the same
n_j to within 1, and is chosen at random. Only theta ~ U(-b, b) is trained, and
the model is not quite the base at the start.

P is the one that PEFT makes of the same `options.proj_seed` with numpy's
generator, so that a folder need hold nothing but theta. It depends on which
modules are adapted, all of them in the model's order; where numbers alone do
not tell, the folder's config does.

Trainable parameters: d in all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import errors
from lora_jax import struct
from lora_jax import types
from lora_jax.adapters import additive
from lora_jax.adapters import base
from lora_jax.adapters import config as config_lib
from lora_jax.adapters import method

NAMES = ("unilora_indices_A", "unilora_indices_B")
SCALES = ("unilora_scales_A", "unilora_scales_B")


@dataclasses.dataclass(frozen=True)
class Options:
  """Attributes:

    theta_d_length: d.
    proj_seed: of P.
    init_theta_d_bound: b.
    init_weights: whether theta starts there; else it is N(0, 1).
    save_indices: whether a folder holds P.
  """

  theta_d_length: int = 256
  proj_seed: int = 42
  init_theta_d_bound: float = 0.02
  init_weights: bool = True
  save_indices: bool = False

  def validate(self) -> None:
    """Raises a `UsageError` if a value is out of range."""
    for name in ("theta_d_length", "init_theta_d_bound"):
      if not getattr(self, name) > 0:
        raise errors.UsageError(
            f"adapter.options.{name}={getattr(self, name)} is out of range; "
            "use a positive number")
    if self.proj_seed < 0:
      raise errors.UsageError(
          f"adapter.options.proj_seed={self.proj_seed} is none that numpy "
          "takes; use 0 or more")


@struct.dataclass
class Vector(base.Adapter):
  """What all modules share.

  Attributes:
    theta: `[d]`.
    root: `[d]`, 1 / sqrt(n_j).
    down: by target, `[n, i, r]` int32, which of theta A's entries are.
    up: by target, `[n, r, o]` int32, likewise.
    saved: whether a folder holds them.
  """

  theta: types.Array = base.trained(None)
  root: types.Array = base.frozen()
  down: Mapping[str, types.Array] = base.frozen()
  up: Mapping[str, types.Array] = base.frozen()
  saved: bool = base.static(default=False)

  def to_peft(self, embedding=False):
    return {"unilora_theta_d": self.theta}


@struct.dataclass
class UniLoRA(additive.Additive):
  """Attributes:

    rate: `[]`, dropout rate.
    rank: `[]` int32, 0: not adapted.
    turn: `[]` int32, its own among the modules of its target.
    target: its name.
    vector: while it is used; see `Adapters.shared`.
  """

  rate: types.Array = base.frozen()
  rank: types.Array = base.frozen()
  turn: types.Array = base.frozen()
  target: str = base.static(default="")
  vector: Any = base.frozen(default=None)

  def bound(self, shared):
    return dataclasses.replace(self, vector=shared)

  def _indices(self):
    return (self.vector.down[self.target][self.turn],
            self.vector.up[self.target][self.turn])

  def factors(self):
    down, up = self._indices()
    entries = self.vector.theta * self.vector.root
    return entries[down], self.active(entries[up], 0.0)

  def to_peft(self, embedding=False):
    if not self.vector.saved:
      return {}
    found = {}
    for name, scale, at in zip(NAMES, SCALES, self._indices(), strict=True):
      # On the host, where files are written, int64 as PEFT has it.
      found[name] = at.T.astype(np.int64) if isinstance(
          at, np.ndarray) else at.T
      found[scale] = self.vector.root[at.T]
    return found

  @classmethod
  def from_peft(cls, tensors, slot):
    del tensors  # P is with what is shared.
    return _module(slot)

  @classmethod
  def peft_rank(cls, tensors):
    return len(tensors[NAMES[0]]) if tensors else None


def _module(slot):
  return UniLoRA(turn=jnp.asarray(slot.turn, jnp.int32), target=slot.target,
                 **slot.values("rate", "rank"))


def share(key, modules):
  """theta and P."""
  options = modules.options
  theta = jax.random.normal(key, options.theta_d_length, jnp.float32)
  if options.init_weights:
    bound = options.init_theta_d_bound
    theta = jax.random.uniform(key, theta.shape, jnp.float32, -bound, bound)
  return _drawn(theta, modules)


def _drawn(theta, modules):
  options, r = modules.options, modules.width
  places = list(_places(modules))
  total = sum(r * sum(modules.shapes[target]) for target, _ in places)
  indices = draw(total, options.theta_d_length, options.proj_seed)
  counts = np.bincount(indices, minlength=options.theta_d_length)
  pairs, start = [], 0
  for target, _ in places:
    i, o = modules.shapes[target]
    middle, stop = start + r * i, start + r * (i + o)
    pairs.append((indices[start:middle].reshape(r, i),
                  indices[middle:stop].reshape(o, r)))
    start = stop
  # What is not used at all has no root.
  root = np.where(counts > 0, 1 / np.sqrt(np.maximum(counts, 1.0)), 0.0)
  return _vector(theta, root, places, pairs, options.save_indices)


def draw(count: int, length: int, seed: int) -> np.ndarray:
  """Which of theta's entries that many places have, `[count]` int64, as PEFT
  draws it: the same share of each, what is left of some, shuffled."""
  generator = np.random.default_rng(seed)
  each, left = divmod(count, length)
  found = np.repeat(np.arange(length), each)
  if left:
    found = np.concatenate(
        [found, generator.choice(length, size=left, replace=False)])
  generator.shuffle(found)
  return found


def _places(modules) -> Iterator[tuple[str, int]]:
  """(target, layer) of every adapted module, in the model's order."""
  numbers = modules.numbers()
  found = {numbers[target][layer]: (target, layer)
           for target, ranks in modules.ranks.items()
           for layer, rank in enumerate(ranks) if rank}
  return (found[number] for number in sorted(found))


def _vector(theta, root, places, pairs, saved):
  """`Vector` of PEFT's pairs of indices, `[r, i]` and `[o, r]`, of places."""

  def stacked(k):
    return {target: jnp.asarray(np.stack([
        pair[k].T for (name, _), pair in zip(places, pairs, strict=True)
        if name == target]), jnp.int32) for target in dict(places)}

  return Vector(theta=theta, root=jnp.asarray(root, jnp.float32),
                down=stacked(0), up=stacked(1), saved=saved)


def init(key, weight, slot, shared=None):
  """The adapter of one module before the first step."""
  del key, weight, shared
  return _module(slot)


def _config(config: config_lib.AdapterConfig) -> dict[str, Any]:
  return dataclasses.asdict(config.options) | {
      "r": config.rank, "unilora_dropout": float(config.dropout),
      "fan_in_fan_out": False, "bias": "none"}


def _block(config: Mapping[str, Any]) -> dict[str, Any]:
  targets, layers = config["target_modules"], config.get("layers_to_transform")
  if targets is None:
    raise KeyError("target_modules")
  return {"rank": int(config["r"]), "targets": targets,
          "layers": (layers,) if isinstance(layers, int) else layers or None,
          "dropout": float(config.get("unilora_dropout") or 0.0),
          "options": method.named(Options, config)}


def _shared(tensors, config, modules):
  theta = np.asarray(tensors["unilora_theta_d"], np.float32)
  d = config.options.theta_d_length
  if theta.shape != (d,):
    raise errors.UserError(
        f"unilora_theta_d has shape {theta.shape}, and theta_d_length is {d}; "
        "save the adapter again")
  if not config.options.save_indices:
    return _drawn(jnp.asarray(theta), modules)
  places, root = list(_places(modules)), np.zeros(d, np.float32)
  own = [modules.tensors[target][layer] for target, layer in places]
  pairs = [tuple(one[name] for name in NAMES) for one in own]
  for one, pair in zip(own, pairs, strict=True):
    for scale, at in zip(SCALES, pair, strict=True):
      if at.min() < 0 or at.max() >= d:
        raise errors.UserError(
            f"unilora_indices go from {at.min()} to {at.max()}, and theta has "
            f"{d} entries; save the adapter again")
      root[at] = one[scale]
  for one, pair in zip(own, pairs, strict=True):
    for scale, at in zip(SCALES, pair, strict=True):
      if not np.array_equal(root[at], one[scale]):
        raise errors.UserError(
            "unilora_scales differ where unilora_indices do not; save the "
            "adapter again")
  return _vector(jnp.asarray(theta), root, places, pairs, True)


METHOD = method.Method(
    summary="h = x W0 + x A B, whose entries are of one vector",
    paper="arXiv 2506.00799", adapter=UniLoRA, init=init, share=share,
    count="0", count_shared="theta_d_length", options=Options,
    identity_at_init=False,
    tiny={"options": {"theta_d_length": 60, "init_theta_d_bound": 2.0}},
    form=method.Form(
        peft_type="UNILORA", config=_config, block=_block, shared=_shared,
        neutral={"bias": ("none",), "fan_in_fan_out": (False,),
                 "layers_pattern": (None, "", [], "layers", ["layers"])}))
