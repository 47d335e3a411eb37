"""Context-aware prompt tuning (Blau et al. 2024, arXiv 2410.17222).

  E' = [C + D, E[tokens]],  |D_j| <= e_j sqrt(d / 2048)

C `[n, d]` are the embeddings of a context of examples and stay, D `[n, d]` is
trained from zero, each row within a ball. Every token of the context has a
type, in PEFT's numbers: of example k = 0, 1, ... 4 k + 1 is the format of the
input, 4 k + 2 the input, 4 k + 3 the format of the label and 4 k + 4 the label.
e_j is `format_epsilon` of formats and `epsilon` of inputs; the D_j of labels
are zero. After each step D is projected onto the balls.

The labels of the context are learned, too: training predicts each of them from
what is before it, those of the last example with weight `decay` of that of the
rows' own tokens, of the one before with decay^2 and so on. (PEFT divides the
loss by the number of labels, not by their weights; and with its factor of 1, or
`none`, all weigh the same, as here.) Evaluation does not count them.

PEFT's files hold C + D. What is read from one is C, and D is zero again.

Trainable parameters: n d, with the rows of labels, which are not moved.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from lora_jax import errors
from lora_jax import struct
from lora_jax import types
from lora_jax.adapters import base
from lora_jax.adapters import config as config_lib
from lora_jax.adapters import method
from lora_jax.adapters import prefix
from lora_jax.adapters import prompt

# The width at which an epsilon is what it says.
WIDTH = 2048


@dataclasses.dataclass(frozen=True)
class Options:
  """Attributes:

    ids: tokens of the context.
    types: of each; a single one is of all.
    epsilon, format_epsilon: how far inputs and formats may move.
    decay: of the weights of labels, from example to example.
  """

  ids: tuple[int, ...] = (0,)
  types: tuple[int, ...] = (1,)
  epsilon: float = 0.1
  format_epsilon: float = 0.1
  decay: float = 1.0

  @property
  def tokens(self) -> int:
    """n."""
    return len(self.ids)

  @property
  def each(self) -> np.ndarray:
    """Every token's type, `[n]`."""
    return np.resize(np.asarray(self.types, np.int32), self.tokens)

  def validate(self) -> None:
    prefix.check_tokens(self.tokens)
    if min(self.ids) < 0:
      raise errors.UsageError(
          f"adapter.options.ids={self.ids} are not all token ids; use integers "
          "from 0")
    if len(self.types) not in (1, self.tokens) or min(self.types) < 0:
      raise errors.UsageError(
          f"adapter.options.types={self.types} are not types of "
          f"{self.tokens} tokens; give each of adapter.options.ids an integer "
          "from 0, or all the same one")
    for name in ("epsilon", "format_epsilon", "decay"):
      if not getattr(self, name) >= 0:
        raise errors.UsageError(
            f"adapter.options.{name}={getattr(self, name)} is out of range; "
            "use a number of at least 0")


@struct.dataclass
class Context(base.Adapter):
  """Attributes:

    delta: D `[n, d]`.
    rows: C `[n, d]`.
    radius: `[n]`, how far each may move; 0: not at all.
    ids: `[n]` int32, the tokens.
    weights: `[n]`, of predicting each in training.
    rank: `[]` int32.
  """

  delta: types.Array = base.trained(None, None)
  rows: types.Array = base.frozen(None, None)
  radius: types.Array = base.frozen(None)
  ids: types.Array = base.frozen(None)
  weights: types.Array = base.frozen(None)
  rank: types.Array = base.frozen()

  def virtual(self):
    # Where nothing may move there is no gradient, as PEFT's hook has it.
    return self.rows + jnp.where(self.radius[:, None] > 0, self.delta, 0.0)

  def labels(self):
    return self.ids, self.weights


@dataclasses.dataclass(frozen=True)
class Projection(method.Rule):
  """Projects D after every update.

  PEFT does so before it uses D, and saves no other: the next gradient and the
  next update are those at the projected D there, too.
  """

  def wrap(self, inner):
    inner = optax.with_extra_args_support(inner)

    def update(updates, state, params=None, **extra):
      updates, state = inner.update(updates, state, params, **extra)
      old, step = params.outer["prompt"], updates.outer["prompt"]
      to = projected(old.delta + step.delta,
                     extra["frozen"].outer["prompt"].radius)
      return dataclasses.replace(updates, outer=updates.outer | {
          "prompt": step.replace(delta=to - old.delta)}), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def projected(delta: types.Array, radius: types.Array) -> types.Array:
  """The nearest rows to `delta [n, d]` of norms up to `radius [n]`."""
  norm = jnp.linalg.norm(delta, axis=-1)
  gain = jnp.where(norm > radius, radius / jnp.where(norm > 0, norm, 1), 1.0)
  return delta * gain[:, None]


def weights_of(kinds: np.ndarray, decay: float) -> np.ndarray:
  """Of predicting each token of the context, `[n]` float32.

  Args:
    kinds: `[n]`, type of each.
    decay: from the label of one example to that of the one before.
  """
  labels = [kind for kind in sorted({*kinds.tolist()}, reverse=True)
            if kind > 0 and kind % 4 == 0]
  found = np.zeros(len(kinds), np.float32)
  for turn, kind in enumerate(labels, 1):
    found[kinds == kind] = decay ** turn
  found[0] = 0  # Nothing is before it.
  return found


def _made(rows, options, d: int) -> Context:
  """One that has not moved from `rows [n, d]`."""
  kinds = options.each
  radius = np.where(kinds % 4 == 0, 0.0, np.where(
      kinds % 4 == 2, options.epsilon, options.format_epsilon))
  return Context(
      delta=jnp.zeros_like(rows), rows=rows,
      radius=jnp.asarray(radius * (d / WIDTH) ** 0.5, jnp.float32),
      ids=jnp.asarray(options.ids, jnp.int32),
      weights=jnp.asarray(weights_of(kinds, options.decay)),
      rank=jnp.int32(1))


def init(key, weight, slot, shared=None):
  """The context before the first step."""
  del key, shared
  options, (v, d) = slot.options, weight.shape
  if max(options.ids) >= v:
    raise errors.UsageError(
        f"adapter.options.ids={options.ids} are not tokens of a vocabulary of "
        f"{v}; give those of the model's tokenizer")
  rows = jnp.take(weight, jnp.asarray(options.ids), axis=0)
  return _made(slot.geometry.embed_scale * rows.astype(jnp.float32), options, d)


def rule(config: config_lib.AdapterConfig, steps: int) -> method.Rule:
  """What this adds to training."""
  del config, steps
  return Projection()


def _config(config: config_lib.AdapterConfig) -> dict[str, Any]:
  options = config.options
  return {
      "num_virtual_tokens": options.tokens, "cpt_token_ids": [*options.ids],
      "cpt_tokens_type_mask": options.each.tolist(),
      "cpt_mask": [1] * options.tokens,  # PEFT has no use for it.
      "opt_projection_epsilon": options.epsilon,
      "opt_projection_format_epsilon": options.format_epsilon,
      "opt_weighted_loss_type": "none" if options.decay == 1 else "decay",
      "opt_loss_decay_factor": options.decay}


def _block(config: Mapping[str, Any]) -> dict[str, Any]:
  decays = config.get("opt_weighted_loss_type") == "decay"
  return {"options": {
      "ids": tuple(config["cpt_token_ids"]),
      "types": tuple(config["cpt_tokens_type_mask"]),
      "epsilon": float(config.get("opt_projection_epsilon", 0.1)),
      "format_epsilon": float(
          config.get("opt_projection_format_epsilon", 0.1)),
      "decay": float(config["opt_loss_decay_factor"]) if decays else 1.0}}


def _adapters(tensors, config, geometry) -> base.Adapters:
  return base.Adapters(outer={"prompt": _made(
      prompt.embeddings(tensors, config, geometry), config.options,
      geometry.d)})


METHOD = method.Method(
    summary="E' = [E[context] + D, E[tokens]], D within balls",
    paper="arXiv 2410.17222", adapter=Context, init=init,
    count="options.tokens * d", options=Options, targets="prompt",
    sites=("prompt",), ranked=False, identity_at_init=False, mergeable=False,
    rule=rule, tiny={"options": {
        "ids": (3, 7, 1, 9), "types": (1, 2, 3, 4), "decay": 0.9}},
    form=method.Form(
        peft_type="CPT", config=_config, block=_block, lists_targets=False,
        tensors=prompt.tensors_of, adapters=_adapters))
