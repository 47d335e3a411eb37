"""AdaMSS: low-rank changes of clusters of outputs (NeurIPS 2025,
openreview 8ZdWmpYxT0).

  h_j = x W0_j + dropout(x) N' A_k' B_j,   k = k(j) the cluster of output j

with N `[q, i]` the right singular vectors of W0's randomised SVD of rank
q = min(r, i, o), frozen and as orthonormal as they are found. The outputs are
put into K clusters by k-means of their left singular vectors; each cluster has
an A_k `[s, q]` and each of its outputs a B_j `[s]`. B = 0 at the start, the
rows of A_k are the leading right singular vectors of the cluster's part of U.

A projection with a bias is taken with it, as one more input that is always 1:
N has one column more, and the bias is changed, too.

PEFT has one tensor for each cluster, and not which outputs those are
(`clusters`): what is read from its files has to be told of the weight and bias
that it stands beside. Those must be the ones it was trained on, in the same
precision: of a quantised copy the clusters are others. PEFT's `use_asa`, which
gives up subspaces in training, is refused. So is a rank that reaches o: the
left singular vectors of all outputs are then equally far from one another, and
rounding alone tells their clusters.

Trainable parameters: s (K q + o) a matrix; less where a cluster has less than s
outputs, or `use_dynamic_rank` finds less than s directions.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import errors
from lora_jax import quant
from lora_jax import struct
from lora_jax import types
from lora_jax.adapters import additive
from lora_jax.adapters import base
from lora_jax.adapters import clusters
from lora_jax.adapters import config as config_lib
from lora_jax.adapters import method


@dataclasses.dataclass(frozen=True)
class Options:
  """Attributes:

    num_subspaces: K.
    subspace_rank: s.
    use_dynamic_rank: whether a cluster's A starts with no more rows than its
      outputs have directions.
    svd_threshold: from which part of the largest squared singular value a
      direction is one.
    random_seed: of the SVD.
  """

  num_subspaces: int = 5
  subspace_rank: int = 1
  use_dynamic_rank: bool = False
  svd_threshold: float = 0.1
  random_seed: int = 0

  def validate(self) -> None:
    """Raises a `UsageError` if a value is out of range."""
    for name in ("num_subspaces", "subspace_rank"):
      if getattr(self, name) < 1:
        raise errors.UsageError(
            f"adapter.options.{name}={getattr(self, name)} is out of range; "
            "use 1 or more")


@dataclasses.dataclass(frozen=True)
class Clusters:
  """k(j) `[o]` int32 of a projection.

  Attributes:
    count: K.
    rank: q.
    seed: of the SVD.
    biased: whether it is taken with its bias.
  """

  count: int
  rank: int
  seed: int
  biased: bool

  def __call__(self, place: types.Tree, shared: types.Tree) -> jax.Array:
    del shared
    w = _with_bias(getattr(place, "weight", place),
                   getattr(place, "bias", None), self.biased)
    return jax.pure_callback(
        self._found, jax.ShapeDtypeStruct(w.shape[1:], jnp.int32), w,
        vmap_method="sequential")

  def _found(self, w):
    u, _ = clusters.svd_lowrank(np.asarray(w).T, self.rank, self.seed)
    return clusters.kmeans(u, self.count)


def _with_bias(weight, bias, biased):
  """`[i (+ 1), o]` float32."""
  w = quant.dequantize(weight, jnp.float32)
  if not biased:
    return w
  row = jnp.zeros(w.shape[1]) if bias is None else bias
  return jnp.concatenate([w, row[None].astype(jnp.float32)])


@struct.dataclass
class AdaMSS(additive.Additive):
  """Attributes:

    a: `[K, s, q]`.
    b: `[o, s]`, one cluster after the other, as in the file.
    vectors: `[q, i (+ 1)]`, N.
    sizes: `[K]` int32, outputs of each cluster.
    ranks: `[K]` int32, rows that each A has of its s.
    rate: `[]`, dropout rate.
    rank: `[]` int32, 0: not adapted.
    cluster: `[o]` int32, k, once the weight is known.
    seed: of the SVD.
    biased: whether there is a bias.
  """

  a: types.Array = base.trained(None, None, None)
  b: types.Array = base.up(None, None)
  vectors: types.Array = base.frozen()
  sizes: types.Array = base.frozen()
  ranks: types.Array = base.frozen()
  rate: types.Array = base.frozen()
  rank: types.Array = base.frozen()
  cluster: types.Array | None = base.frozen(default=None)
  seed: int = base.static(default=0)
  biased: bool = base.static(default=False)

  of_bias: ClassVar[bool] = True

  @property
  def constants(self):  # type: ignore[override]
    # What it started from, it keeps, whatever becomes of the base.
    if self.cluster is not None:
      return {}
    return {"cluster": Clusters(self.a.shape[-3], self.vectors.shape[-2],
                                self.seed, self.biased)}

  def with_constants(self, values):
    cluster = values.get("cluster")
    if cluster is None:
      return self
    if not isinstance(cluster, jax.core.Tracer):
      k = self.sizes.shape[-1]
      found = (np.asarray(cluster)[..., None] == np.arange(k)).sum(-2)
      adapted = np.asarray(self.rank > 0)[..., None]
      if (adapted & (found != np.asarray(self.sizes))).any():
        raise errors.UserError(
            "AdaMSS: the outputs of this base fall into clusters of "
            f"{found.tolist()}, the adapter's are of "
            f"{np.asarray(self.sizes).tolist()}; it was made for another base, "
            "or for one of other precision")
    return dataclasses.replace(self, cluster=cluster)

  def _pair(self):
    """Down `[i (+ 1), K s]` and up `[K s, o]`."""
    if self.cluster is None:
      raise ValueError("AdaMSS has yet to see its weight; see partition.beside")
    k, s, q = self.a.shape
    down = jnp.matmul(self.vectors.T, self.a.reshape(k * s, q).T,
                      precision="highest")
    # Row j of the file is of the j-th output in the order of clusters.
    b = self.b[jnp.argsort(jnp.argsort(self.cluster, stable=True))]
    own = jnp.arange(k)[:, None] == self.cluster
    used = (jnp.arange(s) < self.ranks[:, None])[:, :, None] & own[:, None]
    up = jnp.where(used & (self.rank > 0), b.T[None], 0.0)
    return down, up.reshape(k * s, -1)

  def factors(self):
    down, up = self._pair()
    return down[:-1] if self.biased else down, up

  def shift(self, bias):
    if bias is None or not self.biased:
      return bias
    down, up = self._pair()
    return bias + jnp.matmul(down[-1], up, precision="highest")

  def to_peft(self, embedding=False):
    found = {"adamss_newB": self.vectors}
    start = 0
    for k, (size, rank) in enumerate(zip(
        self.sizes.tolist(), self.ranks.tolist(), strict=True)):
      found[f"adamss_A.{k}"] = self.a[k, :rank]
      found[f"adamss_B.{k}"] = self.b[start:start + size, :rank]
      start += size
    return found

  @classmethod
  def from_peft(cls, tensors, slot):
    k, s, _ = _sizes(slot, *slot.shape)
    downs, ups = ([np.asarray(tensors[f"adamss_{name}.{n}"], np.float32)
                   for n in range(k)] for name in "AB")
    return cls(
        a=jnp.asarray(np.stack([
            np.pad(x, ((0, s - len(x)), (0, 0))) for x in downs])),
        b=jnp.asarray(np.concatenate([
            np.pad(x, ((0, 0), (0, s - x.shape[1]))) for x in ups])),
        vectors=jnp.asarray(tensors["adamss_newB"], jnp.float32),
        sizes=np.asarray([len(x) for x in ups], np.int32),
        ranks=np.asarray([len(x) for x in downs], np.int32),
        **_static(slot), **slot.values("rate", "rank"))

  @classmethod
  def peft_rank(cls, tensors):
    return len(tensors["adamss_newB"])

  @classmethod
  def expected(cls, tensors, slot):
    (i, o), options = slot.shape, slot.options
    q = min(int(slot.rank), o, i + _static(slot)["biased"])
    found, left = {"adamss_newB": (q, i + _static(slot)["biased"])}, o
    count = min(options.num_subspaces, o)
    for k in range(count):
      b = tensors.get(f"adamss_B.{k}", np.zeros((0, 0))).shape
      # All outputs are in one of them, the last has those that are left.
      size = left if k == count - 1 else min(b[0], left)
      rank = max(1, min(b[-1], options.subspace_rank))
      found |= {f"adamss_A.{k}": (rank, q), f"adamss_B.{k}": (size, rank)}
      left -= size
    return found


def _sizes(slot, inputs, outputs):
  """(K, s, q) of a projection.

  Raises:
    errors.UsageError: if q leaves its clusters to rounding.
  """
  options = slot.options
  q = min(int(slot.width), inputs, outputs)
  k = min(options.num_subspaces, outputs)
  if k > 1 and q == outputs:
    raise errors.UsageError(
        f"adapter.rank={slot.width}: {slot.target} has {outputs} outputs, "
        "which cannot be told apart by as many directions; use a smaller rank")
  return k, options.subspace_rank, q


def _static(slot):
  geometry = slot.geometry
  return {"seed": slot.options.random_seed, "biased": (
      geometry is not None and slot.target in geometry.biased)}


def init(key, weight, slot, shared=None):
  """The adapter of one module before the first step."""
  del key, shared
  static, options = _static(slot), slot.options
  w = _with_bias(weight, slot.bias, static["biased"])
  i, o = w.shape
  k, s, q = _sizes(slot, i, o)

  def start(w):
    return _start(np.asarray(w).T, k, q, options)

  vectors, cluster, a, sizes, ranks = jax.pure_callback(start, (
      jax.ShapeDtypeStruct((q, i), jnp.float32),
      jax.ShapeDtypeStruct((o,), jnp.int32),
      jax.ShapeDtypeStruct((k, s, q), jnp.float32),
      jax.ShapeDtypeStruct((k,), jnp.int32),
      jax.ShapeDtypeStruct((k,), jnp.int32)), w, vmap_method="sequential")
  return AdaMSS(
      a=a, b=jnp.zeros((o, s), jnp.float32), vectors=vectors, sizes=sizes,
      ranks=ranks, cluster=cluster, **static, **slot.values("rate", "rank"))


def _start(w, count, rank, options):
  """(N, k, A, sizes, ranks) of a weight `[o, i (+ 1)]`."""
  u, vectors = clusters.svd_lowrank(w, rank, options.random_seed)
  # A run that goes on elsewhere has the same: each direction's largest entry
  # is positive.
  sign = np.sign(np.take_along_axis(
      vectors, np.abs(vectors).argmax(1)[:, None], 1))
  u, vectors = u * sign.T, vectors * sign
  cluster = clusters.kmeans(u, count)
  a = np.zeros((count, options.subspace_rank, rank), np.float32)
  sizes, ranks = np.zeros(count, np.int32), np.zeros(count, np.int32)
  for k in range(count):
    own = u[cluster == k]
    sizes[k], ranks[k] = len(own), min(len(own), options.subspace_rank)
    _, s, vt = np.linalg.svd(own, full_matrices=False)
    if options.use_dynamic_rank:
      ranks[k] = min(ranks[k], (s**2 > options.svd_threshold * s[0]**2).sum())
    ranks[k] = min(max(ranks[k], 1), len(vt))
    a[k, :ranks[k]] = vt[:ranks[k]]
  return vectors.astype(np.float32), cluster, a, sizes, ranks


def _config(config: config_lib.AdapterConfig) -> dict[str, Any]:
  return dataclasses.asdict(config.options) | {
      "r": config.rank, "use_asa": False, "init_weights": "orthogonal"}


def _block(config: Mapping[str, Any]) -> dict[str, Any]:
  return {"rank": int(config["r"]),
          "options": method.named(Options, config)}


METHOD = method.Method(
    summary="h_j = x W0_j + x N' A_k' B_j, k the cluster of output j",
    paper="openreview 8ZdWmpYxT0", adapter=AdaMSS, init=init,
    count="subspace_rank * (min(num_subspaces, o) * min(r, o, i + (target in "
          "biased)) + o)",
    options=Options, zero_gradients=("a",),
    tiny={"options": {"num_subspaces": 3, "subspace_rank": 2}},
    form=method.Form(
        peft_type="ADAMSS", config=_config, block=_block,
        neutral={"use_asa": (False,)}))
