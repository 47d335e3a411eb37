"""VB-LoRA: low-rank factors out of a bank of vectors (Li et al., 2405.15179).

  h = x W0 + x A B

where A `[i, r]` and B `[r, o]` are made of pieces of m entries along i and o,
and every piece is a mixture of k vectors of one bank `[n, m]` for all modules:

  piece = sum_j softmax(top_k(logits))_j bank[j]       (eq. 4)

with logits `[n]` of its own. Bank and logits are trained; bank ~ U(-b, b) and
logits ~ N(0, 0.1^2), so that the model is not quite the base at the start.

Trainable parameters: n m, and n r (i + o) / m a matrix.

A folder may hold k numbers of every mixture instead of the n logits. What is
read from it computes the same, and is trained on among those k vectors only.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import errors
from lora_jax import struct
from lora_jax import types
from lora_jax.adapters import additive
from lora_jax.adapters import base
from lora_jax.adapters import config as config_lib
from lora_jax.adapters import method

# The logit of a vector that a folder of k numbers does not name.
_UNNAMED = -1e4


@dataclasses.dataclass(frozen=True)
class Options:
  """Attributes:

    num_vectors: n.
    vector_length: m, which divides i and o.
    topk: k.
    init_vector_bank_bound: b.
    init_logits_std: of the logits.
    save_only_topk_weights: whether a folder has k numbers of every mixture.
  """

  num_vectors: int = 256
  vector_length: int = 256
  topk: int = 2
  init_vector_bank_bound: float = 0.02
  init_logits_std: float = 0.1
  save_only_topk_weights: bool = False

  def validate(self) -> None:
    """Raises:

      errors.UsageError: if there are fewer vectors than a mixture has.
    """
    if not 1 <= self.topk <= self.num_vectors:
      raise errors.UsageError(
          f"adapter.options.topk={self.topk} is out of range; use an integer "
          f"from 1 to num_vectors={self.num_vectors}")


@struct.dataclass
class Bank(base.Adapter):
  """What all modules share.

  Attributes:
    vectors: `[n, m]`.
  """

  vectors: types.Array = base.trained(None, None)

  def to_peft(self, embedding=False):
    return {"vblora_vector_bank": self.vectors}


@struct.dataclass
class VBLoRA(additive.Additive):
  """Attributes:

    logits_a: `[r, i / m, n]`.
    logits_b: `[o / m, r, n]`.
    rate: `[]`, dropout rate.
    rank: `[]` int32, 0: not adapted.
    topk: k.
    few: whether a folder has k numbers of every mixture.
    vectors: `[n, m]`, while it is used; see `Bank`.
  """

  logits_a: types.Array = base.trained(None, None, None)
  logits_b: types.Array = base.trained(None, None, None)
  rate: types.Array = base.frozen()
  rank: types.Array = base.frozen()
  topk: int = base.static(default=2)
  few: bool = base.static(default=False)
  vectors: types.Array = base.frozen(default=None)

  def bound(self, shared):
    return dataclasses.replace(self, vectors=shared.vectors)

  def _top(self, logits):
    """(weights, places) of the mixtures' vectors, `[..., k]` each."""
    values, places = jax.lax.top_k(logits, self.topk)
    return jax.nn.softmax(values), places

  def _pieces(self, logits):
    weights, places = self._top(logits)
    # Products rather than a gather, whose gradient would be a scatter.
    chosen = jax.nn.one_hot(places, logits.shape[-1], dtype=jnp.float32)
    mixture = jnp.einsum("...k,...kn->...n", weights, chosen)
    return jnp.matmul(mixture, self.vectors, precision="highest")

  def factors(self):
    a, b = self._pieces(self.logits_a), self._pieces(self.logits_b)
    r = a.shape[0]
    b = b.swapaxes(0, 1).reshape(r, -1)
    return a.reshape(r, -1).T, self.active(b, 0.0)

  def to_peft(self, embedding=False):
    logits = {"vblora_logits_A": self.logits_a,
              "vblora_logits_B": self.logits_b}
    if not self.few:
      return logits
    n, found = self.logits_a.shape[-1], {}
    kind = jnp.uint8 if n < 2**8 else jnp.int16 if n < 2**15 else jnp.int32
    for name, value in logits.items():
      weights, places = self._top(value)
      found[f"{name}_topk_indices"] = places.astype(kind)
      # The last follows from the others.
      found[f"{name}_topk_weights"] = weights[..., :-1]
    return found

  @classmethod
  def from_peft(cls, tensors, slot):
    options = slot.options

    def logits(name):
      if not options.save_only_topk_weights:
        return jnp.asarray(tensors[name], jnp.float32)
      places = jnp.asarray(tensors[f"{name}_topk_indices"], jnp.int32)
      weights = jnp.asarray(tensors[f"{name}_topk_weights"], jnp.float32)
      last = 1.0 - weights.sum(-1, keepdims=True)
      values = jnp.log(jnp.maximum(
          jnp.concatenate([weights, last], -1), jnp.finfo(jnp.float32).tiny))
      empty = jnp.full((*places.shape[:-1], options.num_vectors), _UNNAMED)
      return jnp.put_along_axis(
          empty, places, values, axis=-1, inplace=False)

    return cls(logits_a=logits("vblora_logits_A"),
               logits_b=logits("vblora_logits_B"), **_static(options),
               **slot.values("rate", "rank"))


def _static(options):
  return {"topk": options.topk, "few": options.save_only_topk_weights}


def share(key, modules):
  """The bank.

  Raises:
    errors.UsageError: if a weight's shape is not made of whole vectors.
  """
  options = modules.options
  n, m = options.num_vectors, options.vector_length
  for target, shape in modules.shapes.items():
    if m < 1 or any(size % m for size in shape):
      raise errors.UsageError(
          f"adapter.options.vector_length={m} does not divide {target}'s "
          f"{shape[0]} x {shape[1]}; use a divisor of all adapted weights' "
          "sizes")
  bound = options.init_vector_bank_bound
  return Bank(vectors=jax.random.uniform(
      key, (n, m), jnp.float32, -bound, bound))


def init(key, weight, slot, shared=None):
  """The adapter of one module before the first step."""
  del shared
  i, o = weight.shape[-2:]
  options, r = slot.options, slot.width
  m, n = options.vector_length, options.num_vectors
  a, b = (
      options.init_logits_std * jax.random.normal(one, shape, jnp.float32)
      for one, shape in zip(jax.random.split(key), (
          (r, i // m, n), (o // m, r, n)), strict=True))
  return VBLoRA(logits_a=a, logits_b=b, **_static(options),
                **slot.values("rate", "rank"))


def _config(config: config_lib.AdapterConfig) -> dict[str, Any]:
  return dataclasses.asdict(config.options) | {
      "r": config.rank, "vblora_dropout": float(config.dropout),
      "fan_in_fan_out": False, "bias": "none"}


def _block(config):
  return {"rank": int(config["r"]),
          "dropout": float(config.get("vblora_dropout") or 0.0),
          "options": method.named(Options, config)}


def _shared(tensors, config, modules):
  del config, modules
  return Bank(vectors=jnp.asarray(tensors["vblora_vector_bank"], jnp.float32))


METHOD = method.Method(
    summary="h = x W0 + x A B, of mixtures of k shared vectors",
    paper="arXiv 2405.15179", adapter=VBLoRA, init=init,
    count="r * (i + o) // vector_length * num_vectors",
    count_shared="num_vectors * vector_length", options=Options,
    identity_at_init=False, share=share,
    tiny={"targets": "q_proj,up_proj,down_proj", "options": {
        "num_vectors": 10, "vector_length": 8,
        "init_vector_bank_bound": 0.5}},
    form=method.Form(
        peft_type="VBLORA", config=_config, block=_block, shared=_shared,
        neutral={"bias": ("none",), "fan_in_fan_out": (False,)}))
