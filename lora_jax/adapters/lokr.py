"""LoKr: Kronecker products (Yeh et al. 2023, LyCORIS, arXiv 2309.14859).

  h = x W0 + s x (W1 (x) W2)        s = alpha / r,  W2 = A2 B2

with W1 `[m, l]` and W2 `[n, k]`, i = m n and o = l k factorised as evenly as
`decompose_factor` lets them be. W2 is a product of rank r where r is less than
half its larger side, else whole; so is W1 with `decompose_both`. W1 = 0 at
init and the rest ~ U(+-1/sqrt(fan)), so that h = x W0; with
`init_weights="lycoris"` it is W2 that is zero.

No matrix `[i, o]` is made: with x as `[..., m, n]`, y_lk = sum_mn x_mn W1_ml
W2_nk is a chain of small products, in the order that takes the least work.

Dropout leaves whole outputs as they are; see `lycoris.dropped`.

Trainable parameters: m l + n k a matrix, or r (m + l) and r (n + k) in their
places.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import errors
from lora_jax import quant
from lora_jax import struct
from lora_jax import types
from lora_jax.adapters import base
from lora_jax.adapters import config as config_lib
from lora_jax.adapters import loha
from lora_jax.adapters import lycoris
from lora_jax.adapters import method
from lora_jax.adapters import pieces

STARTS = {"default": True, "lycoris": "lycoris"}  # As PEFT's configs say it.


@dataclasses.dataclass(frozen=True)
class Options(loha.Options):
  """LoHa's, and attributes:

    decompose_both: whether W1 may be of low rank, too.
    decompose_factor: m and l, where it divides i and o, else the most they
      may be; -1: about the square roots.
    rank_dropout_scale: whether dropout scales what it leaves.
    init_weights: "default" (W1 = 0) or "lycoris" (W2 = 0).
  """

  decompose_both: bool = False
  decompose_factor: int = -1
  rank_dropout_scale: bool = False
  init_weights: str = "default"

  def validate(self) -> None:
    super().validate()
    errors.choose("adapter.options.init_weights", self.init_weights, STARTS)

  def sides(self, i: int, o: int) -> tuple[int, int, int, int]:
    """(m, n, l, k) with i = m n and o = l k."""
    return (*factorised(i, self.decompose_factor),
            *factorised(o, self.decompose_factor))

  def whole(self, i: int, o: int, r: int) -> tuple[bool, bool]:
    """Whether W1, and W2, are matrices of their own and not products."""
    m, n, l, k = self.sides(i, o)
    return not (self.decompose_both and r < max(m, l) / 2), r >= max(n, k) / 2

  def parameters(self, i: int, o: int, r: int) -> int:
    """Trained, of one matrix."""
    m, n, l, k = self.sides(i, o)
    first, second = self.whole(i, o, r)
    return ((m * l if first else r * (m + l))
            + (n * k if second else r * (n + k)))


def factorised(size: int, factor: int) -> tuple[int, int]:
  """Two numbers whose product is `size`, by PEFT's rule.

  A factor that divides comes first, even if it is the larger. Otherwise the
  first is the largest divisor up to sqrt(size) and, unless it is -1, `factor`.

  factorised(48, -1) == (6, 8); factorised(48, 5) == (4, 12)
  factorised(48, 16) == (16, 3); factorised(31, -1) == (1, 31)
  """
  if factor > 0 and size % factor == 0:
    return factor, size // factor
  limit = size if factor == -1 else max(factor, 1)
  first = max(d for d in range(1, int(size ** 0.5) + 1)
              if size % d == 0 and d <= limit)
  return first, size // first


@struct.dataclass
class LoKr(base.Adapter):
  """Attributes (a leading `l` axis when stacked):

    scale: `[]`, s.
    rate: `[]`, rate of dropout of outputs.
    rank: `[]` int32, 0: not adapted.
    w1, w2: `[m, l]` and `[n, k]`, or None where they are products.
    a1, b1: `[m, r]` and `[r, l]`, or None.
    a2, b2: `[n, r]` and `[r, k]`, or None.
    options: the method's.
  """

  scale: types.Array = base.frozen()
  rate: types.Array = base.frozen()
  rank: types.Array = base.frozen()
  w1: types.Array | None = base.up(default=None)
  a1: types.Array | None = base.trained(default=None)
  b1: types.Array | None = base.up(default=None)
  w2: types.Array | None = base.trained(default=None)
  a2: types.Array | None = base.trained(default=None)
  b2: types.Array | None = base.trained(default=None)
  options: Options = base.static(default=Options())

  def _chain(self) -> tuple[str, list[Any]]:
    """Names of axes and matrices whose product is W1 (x) W2."""
    left = ("ml", [self.w1]) if self.a1 is None else (
        "mp,pl", [self.a1, self.b1])
    right = ("nk", [self.w2]) if self.a2 is None else (
        "nq,qk", [self.a2, self.b2])
    return f"{left[0]},{right[0]}", left[1] + right[1]

  def _sides(self) -> tuple[int, int, int, int]:
    def ends(w, a, b):
      return w.shape if w is not None else (a.shape[0], b.shape[1])

    return (*ends(self.w1, self.a1, self.b1), *ends(self.w2, self.a2, self.b2))

  def down_up(self, x):
    m, l, n, k = self._sides()
    names, matrices = self._chain()
    y = jnp.einsum(
        f"...mn,{names}->...lk", x.reshape(*x.shape[:-1], m, n),
        *(w.astype(x.dtype) for w in matrices))
    y = y * self.active(self.scale, 0.0).astype(x.dtype)
    return y.reshape(*x.shape[:-1], l * k)

  def apply(self, x, weight, noise=None):
    added = self.down_up(x)
    if noise is not None:
      added = lycoris.dropped(
          added, noise, self.rate, self.options.module_dropout,
          self.options.rank_dropout_scale)
    return quant.matmul(x, weight) + added

  def merge(self, weight):
    names, matrices = self._chain()
    delta = jnp.einsum(f"{names}->mnlk", *matrices, precision="highest")
    w = quant.dequantize(weight, jnp.float32)
    return w + self.active(self.scale, 0.0) * delta.reshape(w.shape)

  def to_peft(self, embedding=False):
    found = {}
    for n in (1, 2):
      w = getattr(self, f"w{n}")
      if w is not None:
        found[f"lokr_w{n}"] = w.T
      else:
        found[f"lokr_w{n}_a"] = getattr(self, f"b{n}").T
        found[f"lokr_w{n}_b"] = getattr(self, f"a{n}").T
    return found

  @classmethod
  def from_peft(cls, tensors, slot):
    found: dict[str, Any] = {}
    for n in (1, 2):
      names = ((f"w{n}", f"lokr_w{n}"),) if f"lokr_w{n}" in tensors else (
          (f"b{n}", f"lokr_w{n}_a"), (f"a{n}", f"lokr_w{n}_b"))
      found |= {ours: jnp.asarray(tensors[theirs], jnp.float32).T
                for ours, theirs in names}
    return cls(options=slot.options, **found, **slot.values())


def init(key, weight, slot, shared=None):
  """The adapter of one module before the first step."""
  del shared
  (i, o), r, options = weight.shape[-2:], slot.width, slot.options
  m, n, l, k = options.sides(i, o)
  first, second = options.whole(i, o, r)
  lycoris_way = options.init_weights == "lycoris"
  keys = jax.random.split(key, 4)
  found = {}
  # The fan is the second axis of PEFT's tensor, as torch counts it.
  if first:
    found["w1"] = pieces.uniform(keys[0], (m, l), m) * lycoris_way
  else:
    found["a1"] = pieces.uniform(keys[0], (m, r), m)
    found["b1"] = pieces.uniform(keys[1], (r, l), r) * lycoris_way
  if second:
    found["w2"] = pieces.uniform(keys[2], (n, k), n) * (not lycoris_way)
  else:
    found["a2"] = pieces.uniform(keys[2], (n, r), n) * (not lycoris_way)
    found["b2"] = pieces.uniform(keys[3], (r, k), r)
  return LoKr(options=options, **found, **slot.values())


def _config(config: config_lib.AdapterConfig) -> dict[str, Any]:
  options = config.options
  return lycoris.peft_config(config) | {
      "decompose_both": options.decompose_both,
      "decompose_factor": options.decompose_factor,
      "rank_dropout_scale": options.rank_dropout_scale,
      "init_weights": STARTS[options.init_weights]}


def _block(config: Mapping[str, Any]) -> dict[str, Any]:
  found = lycoris.block(config)
  lycoris_way = config.get("init_weights") == "lycoris"
  found["options"] |= {
      "decompose_both": config.get("decompose_both", False),
      "decompose_factor": config.get("decompose_factor", -1),
      "rank_dropout_scale": config.get("rank_dropout_scale", False),
      "init_weights": "lycoris" if lycoris_way else "default"}
  return found


METHOD = method.Method(
    summary="h = x W0 + (alpha/r) x (W1 (x) A2 B2)",
    paper="arXiv 2309.14859", adapter=LoKr, init=init,
    count="options.parameters(i, o, r)", options=Options,
    zero_gradients=("a1", "w2", "a2", "b2"),
    tiny={"rank": 2, "options": {"decompose_both": True}},
    form=method.Form(
        peft_type="LOKR", config=_config, block=_block,
        # Which matrices are products depends on the rank, and a stack has
        # one form.
        neutral={"rank_pattern": (None, {}), "alpha_pattern": (None, {})}))
