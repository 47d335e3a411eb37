"""Starts that look at training rows: EVA, CorDA, LoRA-GA.

Each says what it needs to know of a projection y = x W, W `[i, o]`, and makes
A `[i, r]` and B `[r, o]` of it, as Hugging Face PEFT does. (PEFT's weights and
factors are the transposes.) Sums over tokens are `train.statistics`' to gather.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
import dataclasses
from typing import ClassVar
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import errors
from lora_jax import types
from lora_jax.adapters.starts import decomposed

# Projections that read the same x: what is known of one's inputs holds for all.
SAME_INPUTS = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


@dataclasses.dataclass(frozen=True)
class Informed:
  """A start that looks at rows; its fields are `adapter.init_options`.

  Attributes:
    source: what it needs the sums of, "inputs" or "gradients".
    by_row: whether each row's inputs are divided by their maximum first, and
      rows are what is counted.
    replaces: whether s A B is taken out of the base.
    reads_weight: whether `factors` needs W.
  """

  source: ClassVar[str] = "inputs"
  by_row: ClassVar[bool] = False
  replaces: ClassVar[bool] = True
  reads_weight: ClassVar[bool] = False

  @property
  def labelled(self) -> bool:
    """Whether only tokens that carry a loss count."""
    return False

  def factors(self, sums, w, width, rank, scale):
    """(A, B) of one module.

    Args:
      sums: of the inputs `{"gram": [i, i], "total": [i], "count": []}`, the
        sums of x'x, of x and of 1; or the mean gradient `[i, o]`.
      w: `[i, o]` float32, the original weight, or None.
      width: columns of A; those from `rank` on are zero.
      rank: `[]` int32.
      scale: `[]`, s.
    """
    raise TypeError(f"{type(self).__name__} is the protocol, not a start")


@dataclasses.dataclass(frozen=True)
class Eva(Informed):
  """EVA: explained variance adaptation (Paischer et al. 2024, 2410.07170).

  A's columns are the leading principal components of the inputs, x centred, of
  unit length, and their largest entries positive; B = 0. PEFT finds them
  batch by batch by an incremental PCA, this code all at once out of sums. Then
  ranks move (`redistributed`). PEFT's `whiten` divides by a number that grows
  with the batches it saw; it is left out.

  Attributes:
    rho: a layer's rank grows to at most rho r.
    use_label_mask: whether only tokens that carry a loss count.
    adjust_scaling_factors: whether alpha follows the rank, so that alpha / r
      stays what it was.
  """

  rho: float = 2.0
  use_label_mask: bool = True
  adjust_scaling_factors: bool = True

  replaces: ClassVar[bool] = False

  def validate(self) -> None:
    if not self.rho >= 1:
      raise errors.UsageError(
          f"adapter.init_options.rho={self.rho} is out of range; use 1 (ranks "
          "stay) or more")

  @property
  def labelled(self) -> bool:
    return self.use_label_mask

  def factors(self, sums, w, width, rank, scale):
    """Directions `[i, width]`, and the share of the variance along each."""
    del w, rank, scale
    mean = sums["total"] / sums["count"]
    gram = sums["gram"] - sums["count"] * mean[:, None] * mean
    values, vectors = jnp.linalg.eigh(gram)
    width = min(width, len(mean))
    vectors, values = vectors[:, ::-1][:, :width], values[::-1][:width]
    largest = jnp.take_along_axis(
        vectors, jnp.argmax(jnp.abs(vectors), axis=0)[None], axis=0)
    return (vectors * jnp.sign(largest),
            jnp.maximum(values, 0) / jnp.trace(gram))


@dataclasses.dataclass(frozen=True)
class Corda(Informed):
  """CorDA: context-oriented decomposition (Yang et al. 2024, 2406.05223).

    C W = U S V',  A = sqrt(S / s) C^-1 U,  B = sqrt(S / s) V'

  with C the mean over rows of x'x, where a row's x `[t, i]` is divided by its
  maximum, and d mean(diag C) on C's diagonal, d = 0.01 doubled until C^-1 is
  an inverse to 0.05.

  Attributes:
    corda_method: "ipm", the r largest of S, or "kpm", the r smallest, which
      leaves what the rows needed in the base.
  """

  corda_method: str = "ipm"

  by_row: ClassVar[bool] = True
  reads_weight: ClassVar[bool] = True

  def validate(self) -> None:
    errors.choose("adapter.init_options.corda_method", self.corda_method,
                  dict.fromkeys(("ipm", "kpm")))

  def factors(self, sums, w, width, rank, scale):
    fixed, inverse = _inverted(sums["gram"] / sums["count"])
    u, s, vt = jnp.linalg.svd(
        jnp.matmul(fixed, w, precision="highest"), full_matrices=False)
    root = jnp.sqrt(s / scale)
    first = len(s) - rank if self.corda_method == "kpm" else 0
    u = decomposed.columns(u * root, width, rank, first)
    return (jnp.matmul(inverse.T, u, precision="highest"),
            decomposed.columns(vt.T * root, width, rank, first).T)


def _inverted(c):
  """C with something on its diagonal, and the inverse of that."""
  one, mean = jnp.eye(len(c)), jnp.mean(jnp.diag(c))

  def attempt(damp):
    fixed = c + one * (mean * damp)
    inverse = jnp.linalg.inv(fixed)
    error = jnp.linalg.norm(
        jnp.matmul(fixed, inverse, precision="highest") - one)
    return fixed, inverse, error

  def more(state):
    # Far beyond any that helps; PEFT would go on for good.
    return ~(state[1] < 0.05) & (state[0] < 1e9)

  def double(state):
    return 2 * state[0], attempt(2 * state[0])[2]

  damp, _ = jax.lax.while_loop(more, double, (0.01, attempt(0.01)[2]))
  return attempt(damp)[:2]


@dataclasses.dataclass(frozen=True)
class LoraGa(Informed):
  """LoRA-GA: gradient approximation (Wang et al. 2024, 2407.05000).

    G = U S V',  A = U[:, a],  B = c S[b] V'[b]

  with G `[i, o]` the mean over batches of the gradient of W, a and b index
  sets of r out of the first 2r directions. (The paper has neither S in B nor
  c on one side alone; PEFT does.)

  Attributes:
    direction: "ArB2r" (a the first r, b the next), "A2rBr" (the other way),
      "ArBr" (a odd, b even; from 0), "random" (a = b).
    scale: "stable" (c = o^(1/4) / sqrt(gamma)), "weight_svd" (c makes the
      largest singular value of B that of W), "gd_scale" (A and B divided by
      s), "unit" (c = 1).
    stable_gamma: gamma.
  """

  direction: str = "ArB2r"
  scale: str = "stable"
  stable_gamma: int = 16

  source: ClassVar[str] = "gradients"

  @property
  def reads_weight(self) -> bool:  # type: ignore[override]
    return self.scale == "weight_svd"

  def validate(self) -> None:
    errors.choose("adapter.init_options.direction", self.direction,
                  dict.fromkeys(("ArB2r", "A2rBr", "ArBr", "random")))
    errors.choose("adapter.init_options.scale", self.scale, dict.fromkeys(
        ("stable", "weight_svd", "gd_scale", "unit")))
    if self.stable_gamma <= 0:
      raise errors.UsageError(
          f"adapter.init_options.stable_gamma={self.stable_gamma} is out of "
          "range; use a positive number")

  def factors(self, sums, w, width, rank, scale):
    u, s, vt = decomposed.randomised_svd(sums, 4 * width, niter=4)
    if self.direction == "random":
      u, s, vt = _shuffled(u, s, vt, 2 * rank)
    first, second, step = {
        "ArB2r": (0, rank, 1), "A2rBr": (rank, 0, 1), "ArBr": (1, 0, 2),
        "random": (0, 0, 1)}[self.direction]
    a = decomposed.columns(u, width, rank, first, step)
    b = decomposed.columns(vt.T * s, width, rank, second, step).T
    if self.scale == "stable":
      b = b * (b.shape[1] ** 0.25 / self.stable_gamma ** 0.5)
    elif self.scale == "weight_svd":
      largest = jnp.linalg.norm(b[0])  # S of the first of b.
      of_w = decomposed.randomised_svd(w, width, niter=4)[1][0]
      b = b * jnp.where(largest > 0, of_w / largest, 1.0)
    elif self.scale == "gd_scale":
      a, b = a / scale, b / scale
    return a, b


def _shuffled(u, s, vt, n):
  """The first n directions in another order, then the rest."""
  places = jnp.arange(len(s))
  # A fixed draw: the run's seed is not known here, and nothing hangs on it.
  draw = jax.random.uniform(
      jax.random.key(zlib.crc32(b"lora_ga")), (len(s),))
  order = jnp.argsort(jnp.where(places < n, draw, 2.0 + places))
  return u[:, order], s[order], vt[order]


INFORMED: dict[str, type[Informed]] = {
    "eva": Eva, "corda": Corda, "lora_ga": LoraGa}


def components(
    informed: Informed, ranks: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """How many directions `redistributed` looks at, by target `[l]`.

  Modules with the same inputs have equally many, as in PEFT.

  Args:
    informed: an `Eva`.
    ranks: by target, `[l]`, 0 where a layer is not adapted.
  """
  assert isinstance(informed, Eva)
  rho = informed.rho
  most: dict[str, np.ndarray] = {}
  wide = {name: np.asarray([round(int(r) * rho) for r in values])
          for name, values in ranks.items()}
  for name, values in wide.items():
    source = SAME_INPUTS.get(name, name)
    most[source] = np.maximum(most.get(source, 0), values)
  return {name: np.where(ranks[name] > 0, most[SAME_INPUTS.get(name, name)], 0)
          for name in ranks}


def redistributed(
    ranks: Mapping[str, np.ndarray],
    limits: Mapping[str, np.ndarray],
    shares: Mapping[str, types.Array],
) -> dict[str, np.ndarray]:
  """EVA's ranks: the budget goes to what explains most of its module's inputs.

  Of all directions of all modules those with the largest shares of variance
  are kept, as many as ranks were given. Of modules with the same inputs the
  first has the largest rank: ties, and PEFT's rule.

  Args:
    ranks: by target `[l]`, 0 where a layer is not adapted.
    limits: see `components`.
    shares: by target `[l, c]`, descending, of the variance.

  Returns:
    Ranks by target `[l]`; 0 for modules that get none.
  """
  first, later = _in_order(ranks)
  where = [*first, *later]
  values, owners = [], []
  for number, (name, layer) in enumerate(where):
    own = np.asarray(shares[name][layer])[:limits[name][layer]]
    values.append(own)
    owners += [number] * len(own)
  budget = int(sum(r.sum() for r in ranks.values()))
  best = np.argsort(-np.concatenate(values), kind="stable")[:budget]
  counts = collections.Counter(owners[n] for n in best)
  found = {place: counts[number] for number, place in enumerate(where)}
  for place, leader in later.items():
    if found[leader] < found[place]:
      found[leader], found[place] = found[place], found[leader]
  return {name: np.asarray(
      [found.get((name, layer), 0) for layer in range(len(values))])
          for name, values in ranks.items()}


def _in_order(ranks: Mapping[str, np.ndarray]) -> tuple[
    list[tuple[str, int]], dict[tuple[str, int], tuple[str, int]]]:
  """(modules that are the first to read their inputs, the others and who is),
  in the order of the model."""
  leaders: dict[tuple[str, int], tuple[str, int]] = {}
  first, later = [], {}
  depth = max(len(r) for r in ranks.values())
  stacked = [n for n in ORDER if n in ranks]
  for layer in range(depth):
    for name in stacked:
      if not ranks[name][layer]:
        continue
      source = SAME_INPUTS.get(name, name), layer
      leader = leaders.setdefault(source, (name, layer))
      if leader == (name, layer):
        first.append(leader)
      else:
        later[name, layer] = leader
  first += [(n, 0) for n in ranks if n not in ORDER]
  return first, later


# Of a layer's projections in the modules of transformers.
ORDER: Sequence[str] = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
    "down_proj")
