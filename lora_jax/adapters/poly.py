"""Polytropon and multi-head routing: skills that tasks mix (Ponti et al. 2022,
arXiv 2202.13914; Caccia et al. 2022, arXiv 2211.03831).

  h = x W0 + x A B / r
  A = [sum_s w_qs A_qs] below one another, B = [sum_s w_qs B_qs] side by side

for the splits q of i and o, with `n_skills` A_qs `[i/n_splits, r]` and B_qs
`[r, o/n_splits]` of each, and w_q = g_q / sum_s g_qs of the router's logits Z
`[n_tasks, n_splits, n_skills]` at the task: g = sigmoid(Z), and in training
sigmoid(Z + e) with e ~ Logistic(0, 1) drawn for every example (a relaxed
Bernoulli at temperature 1). One split is Polytropon, several are multi-head
routing. A starts as torch's linear layers, B at zero, Z ~ U(-0.001, 0.001).

All examples of a run are of one task, `task`: its logits are trained and used,
and merged. Those of the others are kept and written, so that PEFT's folders
come back whole, but batches of several tasks, for which the router was made,
are not mixed here. PEFT is told the task with every call; our folders say it as
`task_id`, which PEFT ignores and which may be edited, to go on with another.

Trainable parameters: n_skills (r (i + o) + n_splits) a matrix.
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
from lora_jax.adapters import additive
from lora_jax.adapters import base
from lora_jax.adapters import config as config_lib
from lora_jax.adapters import method
from lora_jax.adapters import prefix

# Below a sum of gates, as PEFT has it.
EPS = 1e-12


@dataclasses.dataclass(frozen=True)
class Options:
  """Attributes:

    n_tasks: rows of the router.
    n_skills: pairs of A and B that are mixed.
    n_splits: of i and o, which it divides.
    task: which of the tasks is trained and used, from 0.
  """

  n_tasks: int = 1
  n_skills: int = 4
  n_splits: int = 1
  task: int = 0

  def validate(self) -> None:
    """Raises a `UsageError` if a value is out of range."""
    for name in ("n_tasks", "n_skills", "n_splits"):
      if not 1 <= getattr(self, name) <= 4096:
        raise errors.UsageError(
            f"adapter.options.{name}={getattr(self, name)} is out of range; "
            "use an integer from 1 to 4096")
    if not 0 <= self.task < self.n_tasks:
      raise errors.UsageError(
          f"adapter.options.task={self.task} is out of range; use an integer "
          f"from 0 to {self.n_tasks - 1}, for n_tasks={self.n_tasks}")


@struct.dataclass
class Poly(additive.Additive):
  """Attributes:

    a: `[q, s, i/q, r]` for q splits and s skills.
    b: `[q, s, r, o/q]`.
    logits: `[q, s]`, Z of the task.
    others: `[n_tasks, q s]`, Z of all; what it has of the task itself is not
      used.
    task: `[]` int32, its number.
    scale: `[]`, 1 / r.
    rank: `[]` int32, 0: not adapted.
  """

  a: types.Array = base.trained(None, None, None, None)
  b: types.Array = base.up(None, None, None, None)
  logits: types.Array = base.trained(None, None)
  others: types.Array = base.frozen(None, None)
  task: types.Array = base.frozen()
  scale: types.Array = base.frozen()
  rank: types.Array = base.frozen()

  def factors(self):
    w = _shares(self.logits)
    a = jnp.einsum("qs,qspr->qpr", w, self.a, precision="highest")
    b = jnp.einsum("qs,qsrc->rqc", w, self.b, precision="highest")
    r = a.shape[-1]
    return (a.reshape(-1, r),
            self.active(self.scale * b.reshape(r, -1), 0.0))

  def apply(self, x, weight, noise=None):
    y = quant.matmul(x, weight)
    if noise is None:
      return y + self.down_up(x)
    drawn = noise.of_examples().logistic(
        jnp.zeros((*x.shape[:-1], self.logits.size)))
    w = _shares(self.logits + drawn.reshape(
        *x.shape[:-1], *self.logits.shape)).astype(x.dtype)
    parts = x.reshape(*x.shape[:-1], w.shape[-2], -1)
    h = jnp.einsum("...qp,qspr->...qsr", parts, self.a.astype(x.dtype))
    h = jnp.einsum("...qs,...qsr->...r", w, h)
    h = w[..., None] * h[..., None, None, :]
    b = self.active(self.scale * self.b, 0.0).astype(x.dtype)
    return y + jnp.einsum("...qsr,qsrc->...qc", h, b).reshape(y.shape)

  def to_peft(self, embedding=False):
    return {"poly_lora_A": self.a, "poly_lora_B": self.b,
            "poly_router.module_logits": jnp.asarray(self.others).at[
                self.task].set(self.logits.reshape(-1))}

  @classmethod
  def from_peft(cls, tensors, slot):
    a, b, table = (jnp.asarray(tensors[name], jnp.float32) for name in (
        "poly_lora_A", "poly_lora_B", "poly_router.module_logits"))
    return _adapter(a, b, table, slot)


def _shares(logits: types.Array) -> jax.Array:
  """w `[..., s]` of logits, noisy or not."""
  gates = jax.nn.sigmoid(logits)
  return gates / (gates.sum(-1, keepdims=True) + EPS)


def _adapter(a, b, table, slot) -> Poly:
  task = slot.options.task
  return Poly(
      a=a, b=b, logits=table[task].reshape(a.shape[:2]), others=table,
      task=jnp.int32(task), **slot.values("scale", "rank"))


def init(key, weight, slot, shared=None):
  """The adapter of one module before the first step.

  Raises:
    errors.UsageError: if the weight cannot be split.
  """
  del shared
  options, (i, o), r = slot.options, weight.shape[-2:], slot.width
  q, s = options.n_splits, options.n_skills
  if i % q or o % q:
    raise errors.UsageError(
        f"adapter.options.n_splits={q} does not divide {slot.target}'s {i} x "
        f"{o}; use a divisor of all adapted weights' sizes")
  first, second = jax.random.split(key)
  return _adapter(
      prefix.uniform(first, (q, s, i // q, r), i // q),
      jnp.zeros((q, s, r, o // q)), jax.random.uniform(
          second, (options.n_tasks, q * s), jnp.float32, -1e-3, 1e-3), slot)


def _config(config: config_lib.AdapterConfig) -> dict[str, Any]:
  options = config.options
  found = {"r": config.rank, "poly_type": "poly", "init_weights": True}
  for name in ("n_tasks", "n_skills", "n_splits"):
    found[name] = getattr(options, name)
  return found | ({"task_id": options.task} if options.task else {})


def _block(config: Mapping[str, Any]) -> dict[str, Any]:
  return {"rank": int(config["r"]), "options": method.named(
      Options, config) | {"task": int(config.get("task_id", 0))}}


METHOD = method.Method(
    summary="h = x W0 + x A B / r, A and B mixed of skills by the task's "
            "router",
    paper="arXiv 2202.13914", adapter=Poly, init=init,
    count="n_skills * (r * (i + o) + n_splits)", options=Options,
    scale=lambda alpha, r, options: 1 / r, zero_gradients=("a", "logits"),
    samples=True, tiny={
        "targets": "q_proj,up_proj,down_proj", "rank": 2,
        "options": {"n_tasks": 2, "n_skills": 3, "n_splits": 2}},
    form=method.Form(
        peft_type="POLY", config=_config, block=_block,
        neutral={"poly_type": ("poly",)}))
