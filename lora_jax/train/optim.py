"""Optimisers, schedules and clipping, with every number traced.

A learning rate, a weight decay or a schedule is data, not program: a sweep
over them compiles one step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_jax import errors
from lora_jax import struct
from lora_jax import trees
from lora_jax import types
from lora_jax.adapters import method as method_lib
from lora_jax.adapters import partition
from lora_jax.train import adam8bit


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """The `optim` block of a config.

  Attributes:
    name: a key of `OPTIMIZERS`.
    learning_rate: peak learning rate.
    schedule: a key of `SCHEDULES`.
    warmup: steps of linear warm-up; below 1, a share of all steps.
    weight_decay: decoupled decay (AdamW), on matrices only.
    clip_norm: largest global norm of the gradient; 0 is off.
    b1, b2, eps: Adam's.
    decay: share of all steps over which `wsd` decays at the end.
    final: learning rate at the end, as a share of the peak.
    lora_plus_ratio: learning rate of B (and of all vectors, such as DoRA's
      magnitudes) as a multiple of A's: LoRA+, arXiv 2402.12354; 1 is off.
    lora_plus_embedding: peak learning rate of LoRA on `embed_tokens` under
      LoRA+; 0 leaves it at `learning_rate`.
  """

  name: str = "adamw"
  learning_rate: float = 2e-4
  schedule: str = "cosine"
  warmup: float = 0.03
  weight_decay: float = 0.0
  clip_norm: float = 1.0
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  decay: float = 0.2
  final: float = 0.0
  lora_plus_ratio: float = 1.0
  lora_plus_embedding: float = 1e-6

  def validate(self) -> OptimConfig:
    """Returns itself; raises `errors.UsageError` on a bad value."""
    errors.choose("optim.name", self.name, OPTIMIZERS)
    errors.choose("optim.schedule", self.schedule, SCHEDULES)
    ranges = {
        "learning_rate": (0.0, 100.0), "warmup": (0.0, 1e9),
        "weight_decay": (0.0, 1e3), "clip_norm": (0.0, 1e9),
        "b1": (0.0, 1.0), "b2": (0.0, 1.0), "eps": (0.0, 1.0),
        "decay": (0.0, 1.0), "final": (0.0, 1.0),
        "lora_plus_ratio": (0.0, 1e6), "lora_plus_embedding": (0.0, 100.0)}
    for name, (low, high) in ranges.items():
      value = getattr(self, name)
      if not low <= value <= high:
        raise errors.UsageError(
            f"optim.{name}={value} is out of range; use a number from {low:g} "
            f"to {high:g}")
    if self.schedule == "range" and not self.final:
      raise errors.UsageError(
          "optim.schedule=range begins at optim.final times the learning rate; "
          "set optim.final, e.g. to 1e-4")
    return self


@struct.dataclass
class Hyper:
  """What a step is told of the optimiser; float32 scalars, all traced."""

  learning_rate: types.Array
  weight_decay: types.Array
  clip_norm: types.Array
  b1: types.Array
  b2: types.Array
  eps: types.Array
  # Multiples of the learning rate, by name of `adapters.base.RATE_GROUPS`.
  up: types.Array = np.float32(1)
  embedding: types.Array = np.float32(1)


def _cosine(config, steps):
  return optax.cosine_decay_schedule(1.0, steps, config.final)


def _linear(config, steps):
  return optax.linear_schedule(1.0, config.final, steps)


def _constant(config, steps):
  del config, steps
  return optax.constant_schedule(1.0)


def _wsd(config, steps):
  # Warm-up, stable, decay (arXiv 2404.06395); the decay here is linear.
  decay = max(1, round(config.decay * steps))
  return optax.join_schedules(
      [optax.constant_schedule(1.0),
       optax.linear_schedule(1.0, config.final, decay)], [steps - decay])


def _inverse_sqrt(config, steps):
  # lr ~ 1/sqrt(step) from the end of the warm-up on (Vaswani et al. 2017).
  del steps
  knee = max(config.warmup, 1.0)
  return lambda step: jnp.sqrt(knee / (knee + step))


def _range(config, steps):
  # A range test (arXiv 1506.01186): equal factors from `final` to the peak.
  return lambda step: config.final ** (1 - (step + 1) / steps)


SCHEDULES = {
    "cosine": _cosine,
    "linear": _linear,
    "constant": _constant,
    "wsd": _wsd,
    "inverse_sqrt": _inverse_sqrt,
    "range": _range,
}


def learning_rates(config: OptimConfig, steps: int) -> np.ndarray:
  """Learning rate of every step, `[steps]` float32.

  Warm-up is linear over `warmup` steps, or that share of all steps below 1,
  and reaches the peak on its last step; the schedule follows.
  """
  warmup = config.warmup
  warmup = round(warmup * steps) if warmup < 1 else int(warmup)
  warmup = min(warmup, steps)
  config = dataclasses.replace(config, warmup=float(warmup))
  after = SCHEDULES[config.schedule](config, max(steps - warmup, 1))
  values = [(i + 1) / warmup for i in range(warmup)]
  rest = np.arange(steps - warmup)
  tail = np.asarray(jax.vmap(after)(rest)) if rest.size else rest
  return np.float32(config.learning_rate) * np.concatenate(
      [np.asarray(values, np.float32), tail.astype(np.float32)])


def hyper(config: OptimConfig, learning_rate: float) -> Hyper:
  """The traced values of one step."""
  clip = config.clip_norm if config.clip_norm > 0 else np.inf
  values = (learning_rate, config.weight_decay, clip, config.b1, config.b2,
            config.eps, config.lora_plus_ratio, _embedding_ratio(config))
  return Hyper(*map(np.float32, values))


def _embedding_ratio(config: OptimConfig) -> float:
  """Learning rate of LoRA on embeddings, as a multiple of all others'."""
  given = config.lora_plus_embedding and config.learning_rate
  if config.lora_plus_ratio == 1 or not given:
    return 1.0
  return config.lora_plus_embedding / config.learning_rate


def decay_mask(params: types.Tree) -> types.Tree:
  """True for matrices; norms, biases and magnitudes do not decay.

  Leaves of the scanned layers carry a leading `l` axis, which does not count.
  """
  return jax.tree.map(
      lambda leaf, stacked: leaf.ndim - stacked >= 2,
      params, trees.stacked(params))


def _scale_by_rates(values: Hyper) -> optax.GradientTransformation:
  """Times -lr, or LoRA+'s multiple of it.

  The groups are those of `create_loraplus_optimizer` in Hugging Face PEFT: the
  adapters say which of their matrices are B's and which belong to an
  embedding; vectors go with B.
  """

  def update(updates, params):
    del params
    matrices = decay_mask(updates)

    def scale(group, matrix, update):
      if update is None:  # Of a partial tree: not trained.
        return None
      group = group if matrix else "up"
      rate = -values.learning_rate
      return update * (rate if group is None else rate * getattr(values, group))

    return jax.tree.map(
        scale, partition.rate_groups(updates), matrices, updates,
        is_leaf=lambda x: x is None)

  return optax.stateless(update)


# What makes an update of a gradient: Adam's b1, b2 and eps, and how its first
# moment is stored -> a transformation.
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": optax.scale_by_adam,
    "adamw8bit": adam8bit.scale_by_adam,
}


def transform(
    values: Hyper, mu_dtype: str = "float32", name: str = "adamw",
    rules: Sequence[method_lib.Rule] = (),
) -> optax.GradientTransformationExtraArgs:
  """AdamW (arXiv 1711.05101) after clipping by global norm.

  Args:
    values: traced.
    mu_dtype: how the first moment is stored, where it is not in 8 bits.
    name: a key of `OPTIMIZERS`.
    rules: what methods add to it, after clipping. Its `update` then wants
      `frozen=`; see `adapters.method.Rule`.
  """
  clip = optax.clip_by_global_norm(values.clip_norm)
  inner = (
      OPTIMIZERS[name](values.b1, values.b2, values.eps, mu_dtype=mu_dtype),
      optax.add_decayed_weights(values.weight_decay, decay_mask),
      _scale_by_rates(values),
  )
  if not rules:
    return optax.chain(clip, *inner)
  wrapped: optax.GradientTransformation = optax.chain(*inner)
  for rule in rules:
    wrapped = rule.wrap(wrapped)
  return optax.chain(clip, wrapped)
