"""Number formats of a run, and dynamic loss scaling.

What is in which format under `compute.dtype`:

                              float32    bfloat16   float16
  activations, their gradient float32    bfloat16   float16
  unquantised base parts      float32    bfloat16   float16    base_dtype
  norm statistics, RoPE tables, softmax, logits of the loss,
  loss, quantisation scales   float32    float32    float32
  adapters (master copy)      float32    float32    float32    adapter_dtype
  their gradient, clipping    float32    float32    float32
  Adam's mu                   float32    float32    float32    optim_dtype
  Adam's nu                   float32    float32    float32
  both under adamw8bit        uint8      uint8      uint8      optim.name
  operands of frozen products,
  while training              float32    bfloat16   float16    frozen_matmul
  loss scale                  none       none       dynamic

float16 holds 6e-8 to 65504, and gradients of a mean over thousands of tokens
are mostly smaller. The loss is therefore multiplied by a power of two before
it is differentiated and the gradient is divided by it in float32
(Micikevicius et al. 2018, arXiv 1710.03740, section 3.2). The factor is found
as a run goes, by jmp's and PyTorch's rule:

  gradient finite `interval` times in a row   scale <- 2 scale
  gradient not finite                         scale <- scale / 2, step skipped
"""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp

from lora_jax import errors
from lora_jax import struct
from lora_jax import types
from lora_jax.quant import fp8

COMPUTE = ("float32", "bfloat16", "float16")
# A float16 master copy would lose most of a run's updates, and float16
# moments the squares of small gradients.
STORED = ("float32", "bfloat16")

# Below 1 the gradient itself is out of float16's range: scaling is no help.
MIN_SCALE = 1.0
MAX_SCALE = 2.0**24

# Apart from the layers' numbers, which dropout folds into the same key.
_ROUNDING = 2**31 - 1


def base_dtype(dtype: str, base: str = "auto") -> str:
  """How unquantised base parts are stored; checks both names.

  Args:
    dtype: compute type of activations.
    base: `compute.base_dtype`; "auto" is `dtype`.

  Raises:
    errors.UsageError: for an unknown name.
  """
  errors.choose("compute.dtype", dtype, dict.fromkeys(COMPUTE))
  errors.choose("compute.base_dtype", base, dict.fromkeys(("auto", *COMPUTE)))
  return dtype if base == "auto" else base


def check_frozen_matmul(name: str, dtype: str, method: str) -> None:
  """Whether a run can multiply its frozen weights as asked for.

  Args:
    name: `compute.frozen_matmul`.
    dtype: compute type of activations.
    method: `adapter.method`.

  Raises:
    errors.UsageError: for an unknown name, or where it does not apply.
    errors.UserError: if this machine's devices cannot.
  """
  fp8.check(name, dtype)
  if method == "full" and name != "auto":
    raise errors.UsageError(
        f"compute.frozen_matmul={name} is for frozen weights, and "
        "adapter.method=full trains them all; use compute.frozen_matmul=auto")


@dataclasses.dataclass(frozen=True)
class Precision:
  """What the `compute` block says of training's number formats.

  Attributes:
    adapter_dtype: how trained parameters are stored; a step works on float32.
    optim_dtype: how Adam's first moment is stored.
    loss_scale: the first scale; used if activations are float16.
    loss_scale_interval: finite steps after which the scale doubles.
    frozen_matmul: in what frozen weights are multiplied while training, a key
      of `fp8.RECIPES`.
  """

  adapter_dtype: str = "float32"
  optim_dtype: str = "float32"
  loss_scale: float = 2.0**15
  loss_scale_interval: int = 2000
  frozen_matmul: str = "auto"

  def validate(self) -> Precision:
    """Returns itself; raises `errors.UsageError` on a bad value."""
    for name in ("adapter_dtype", "optim_dtype"):
      errors.choose(
          f"compute.{name}", getattr(self, name), dict.fromkeys(STORED))
    errors.choose(
        "compute.frozen_matmul", self.frozen_matmul, fp8.RECIPES)
    if not MIN_SCALE <= self.loss_scale <= MAX_SCALE:
      raise errors.UsageError(
          f"compute.loss_scale={self.loss_scale} is out of range; use a "
          f"number from {MIN_SCALE:g} to {MAX_SCALE:.0f}")
    if self.loss_scale_interval < 1:
      raise errors.UsageError(
          f"compute.loss_scale_interval={self.loss_scale_interval} is out of "
          "range; use an integer of at least 1")
    return self


@struct.dataclass
class LossScale:
  """The factor and its history; scalars, part of the state of a float16 run.

  Attributes:
    scale: float32.
    good: int32, finite steps since the scale last changed.
    skipped: int32, steps that were skipped so far.
    interval: int32, see `Precision.loss_scale_interval`.
  """

  scale: types.Array
  good: types.Array
  skipped: types.Array
  interval: types.Array


def loss_scale(precision: Precision, dtype: str) -> LossScale | None:
  """The first `LossScale` of a run in `dtype`; None where none is needed."""
  if dtype != "float16":
    return None
  return LossScale(
      scale=jnp.float32(precision.loss_scale), good=jnp.int32(0),
      skipped=jnp.int32(0),
      interval=jnp.int32(precision.loss_scale_interval))


def adjust(state: LossScale, finite: jax.Array) -> LossScale:
  """The scale of the next step.

  Args:
    state: of this step.
    finite: `[]` bool, whether this step's gradient was.
  """
  good = jnp.where(finite, state.good + 1, 0)
  grow = good >= state.interval
  grown = jnp.minimum(state.scale * 2, MAX_SCALE)
  return LossScale(
      scale=jnp.where(
          finite, jnp.where(grow, grown, state.scale), state.scale / 2),
      good=jnp.where(grow, 0, good),
      skipped=state.skipped + jnp.where(finite, 0, 1),
      interval=state.interval)


def widen(params: types.Tree) -> types.Tree:
  """Leaves in float32; those that are already are the same arrays."""
  return jax.tree.map(
      lambda p: p if p.dtype == jnp.float32 else p.astype(jnp.float32), params)


def store(
    key: jax.Array, params: types.Tree, like: types.Tree
) -> types.Tree:
  """float32 leaves in the stored types of `like`.

  To bfloat16 they are rounded up or down at random, so that the mean is the
  value: an update below half a unit in the last place (0.2% of a weight, and
  most are smaller) would otherwise never change it.

  Args:
    key: PRNG key of this step.
    params: float32 leaves.
    like: leaves in float32 or bfloat16.
  """
  draws = jax.random.fold_in(key, _ROUNDING)
  number = itertools.count()

  def one(p, old):
    i = next(number)
    if old.dtype == p.dtype:
      return p
    return _stochastic_bfloat16(jax.random.fold_in(draws, i), p)

  return jax.tree.map(one, params, like)


def _stochastic_bfloat16(key: jax.Array, x: jax.Array) -> jax.Array:
  # bfloat16 is the upper half of float32: a carry out of the lower half,
  # plus a uniform number, comes with the probability of the remainder.
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  bits = bits + (jax.random.bits(key, x.shape, jnp.uint32) >> 16)
  rounded = jax.lax.bitcast_convert_type(
      (bits >> 16).astype(jnp.uint16), jnp.bfloat16)
  return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))
