"""AdaLoRA's budget: which triplets are kept (Zhang et al. 2023, 2303.10512).

After the optimiser's step t = 1, 2 ..., with p a parameter as it is then and g
its clipped gradient of that step,

  I = b1 I + (1 - b1) |p g|                 importance          (eq. 9)
  U = b2 U + (1 - b2) | |p g| - I |         its uncertainty     (eq. 10)
  S = (I U)_E + mean (I U)_A + mean (I U)_B of a triplet        (eq. 7, 11)

and of all triplets of all matrices the b(t) of largest S are kept, E being set
to zero in the others, which may come back as long as gradients move their E:

  b(t) = b0                                         t <= ti
         floor((b0 - bT) (1 - (t - ti)/(T - tf - ti))^3 + bT)
         bT                                         t >= T - tf

with b0 triplets at first, bT = target_r times the matrices, T steps, ti =
tinit, tf = tfinal. This is done at every delta_t-th step and at T - tf, with
which I and U end; from there on what is pruned stays so.

Hugging Face PEFT keeps the scores *above* the (b0 - b)-th smallest: where
others equal it, it prunes those as well, and for b = b0 it fails. Here b are
kept; of equal ones the later.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_jax import types
from lora_jax.adapters import base
from lora_jax.adapters import method
from lora_jax.adapters import orthogonal

PARTS = ("layers", "outer")


class State(NamedTuple):
  """Attributes:

    count: int32, updates done: t.
    importance: I, a tree of the AdaLoRA adapters of the parameters.
    uncertainty: U, likewise.
    inner: the optimiser's.
  """

  count: types.Array
  importance: types.Tree
  uncertainty: types.Tree
  inner: types.Tree


def budget(
    t: int, first: int, last: int, tinit: int, end: int) -> int:
  """b(t).

  Args:
    t: the step, from 1.
    first: b0.
    last: bT.
    tinit: ti.
    end: T - tf.
  """
  if t <= tinit:
    return first
  if t >= end:
    return last
  left = 1 - (t - tinit) / (end - tinit)
  return math.floor((first - last) * left**3 + last)


@dataclasses.dataclass(frozen=True)
class Allocation(method.Rule):
  """Attributes:

    options: `adalora.Options`.
    steps: T.
    ranks: `((part, target), ranks of its layers)` of all AdaLoRA adapters.
  """

  options: Any
  steps: int
  ranks: tuple[tuple[tuple[str, str], tuple[int, ...]], ...] = ()

  def bound(self, adapters):
    return dataclasses.replace(self, ranks=tuple(
        ((part, name), tuple(np.atleast_1d(adapter.rank).tolist()))
        for part in PARTS for name, adapter in getattr(adapters, part).items()
        if hasattr(adapter, "e")))

  @property
  def matrices(self) -> int:
    return sum(rank > 0 for _, ranks in self.ranks for rank in ranks)

  @property
  def triplets(self) -> int:
    """b0."""
    return sum(sum(ranks) for _, ranks in self.ranks)

  def budgets(self) -> np.ndarray:
    """b(t) of t = 0, 1, ... T - tf, int32."""
    # Those of a pruned adapter that is trained further may be fewer than bT.
    last = min(self.options.target_r * self.matrices, self.triplets)
    end = self.steps - self.options.tfinal
    return np.asarray([
        budget(t, self.triplets, last, self.options.tinit, end)
        for t in range(end + 1)], np.int32)

  def penalty(self, params):
    total = jnp.float32(0)
    for (part, name), ranks in self.ranks:
      adapter = getattr(params, part)[name]
      used = self._used(ranks, adapter.e)
      for factor in (adapter.a, jnp.swapaxes(adapter.b, -1, -2)):
        total += jnp.sum(orthogonal.distance(factor, used))
    return self.options.orth_reg * total / max(2 * self.matrices, 1)

  def wrap(self, inner):
    inner = optax.with_extra_args_support(inner)

    def init(params):
      mine = self._mine(params)
      return State(jnp.int32(0), jax.tree.map(jnp.zeros_like, mine),
                   jax.tree.map(jnp.zeros_like, mine), inner.init(params))

    def update(updates, state, params=None, **extra):
      grads = self._mine(updates)
      updates, held = inner.update(updates, state.inner, params, **extra)
      t = optax.safe_increment(state.count)
      now = jax.tree.map(
          jnp.add, self._mine(params), self._mine(updates))
      importance, uncertainty = self._scores(now, grads, state, t)
      pruned = self._pruned(
          jax.tree.map(jnp.multiply, importance, uncertainty), params, t)
      return self._without(pruned, updates, params), State(
          t, importance, uncertainty, held)

    return optax.GradientTransformationExtraArgs(init, update)

  def _mine(self, params):
    """The adapters of this rule, with nothing in the place of others'."""
    return base.Adapters(**{
        part: {name: getattr(params, part)[name]
               for (where, name), _ in self.ranks if where == part}
        for part in PARTS})

  def _scores(self, now, grads, state, t):
    """(I, U) after step t."""
    o = self.options
    before_end = t < self.steps - o.tfinal
    found = jax.tree.map(lambda p, g: jnp.abs(p * g), now, grads)

    def smoothed(decay, old, new):
      return jax.tree.map(
          lambda x, y: jnp.where(
              before_end, decay * x + (1 - decay) * y, x), old, new)

    importance = smoothed(o.beta1, state.importance, found)
    return importance, smoothed(
        o.beta2, state.uncertainty, jax.tree.map(
            lambda x, mean: jnp.abs(x - mean), found, importance))

  def _pruned(self, scores, params, t):
    """By adapter, which E are zero after step t."""
    end = self.steps - self.options.tfinal
    flat, shapes = [], []
    for (part, name), ranks in self.ranks:
      s = getattr(scores, part)[name]
      triplet = s.e + jnp.mean(s.a, -2) + jnp.mean(s.b, -1)
      flat.append(jnp.where(
          self._used(ranks, s.e), triplet, jnp.inf).reshape(-1))
      shapes.append(s.e.shape)
    # How many are smaller; padding is above all.
    place = jnp.argsort(jnp.argsort(jnp.concatenate(flat)))
    kept = jnp.asarray(self.budgets())[jnp.minimum(t, end)]
    below = place < self.triplets - kept
    due = ((t > self.options.tinit) & (t % self.options.delta_t == 0)
           | (t == end))
    edges = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
    found = {}
    for (key, _), mask, shape in zip(
        self.ranks, jnp.split(below, edges), shapes, strict=True):
      e = getattr(params, key[0])[key[1]].e
      found[key] = jnp.where(
          t > end, e == 0, due & mask.reshape(shape))
    return found

  def _without(self, pruned, updates, params):
    """Updates that take the E of what is pruned to exactly zero."""
    parts = {}
    for part in PARTS:
      found = dict(getattr(updates, part))
      for (where, name), mask in pruned.items():
        if where == part:
          e = getattr(params, part)[name].e
          found[name] = dataclasses.replace(
              found[name], e=jnp.where(mask, -e, found[name].e))
      parts[part] = found
    return dataclasses.replace(updates, **parts)

  def _used(self, ranks, like):
    """Which triplets are no padding, bool of the shape of E."""
    used = np.arange(like.shape[-1]) < np.asarray(ranks)[:, None]
    return used.reshape(like.shape)
