"""Multi-task prompt tuning (Wang et al. 2023, arXiv 2303.02861).

  E' = [P * (U_k V_k), E[tokens]]  for an example of task k

with P `[n, d]` of all tasks (a product with each element), and U_k `[n, r]`,
V_k `[r, d]` of each of m tasks, both ~ N(0, 0.02^2), r usually 1. An example's
virtual tokens say which task it is of: P's row j of task k has the id
-1 - (k n + j); see `data.virtual`.

Trainable parameters: n d + m r (n + d).
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import errors
from lora_jax import struct
from lora_jax import types
from lora_jax.adapters import base
from lora_jax.adapters import config as config_lib
from lora_jax.adapters import method
from lora_jax.adapters import prompt


@dataclasses.dataclass(frozen=True)
class Options(prompt.Options):
  """As of `prompt.Options`, and

  Attributes:
    tasks: m.
    ranks: r.
  """

  tasks: int = 1
  ranks: int = 1

  def validate(self) -> None:
    super().validate()
    for name in ("tasks", "ranks"):
      if not 1 <= getattr(self, name) <= 4096:
        raise errors.UsageError(
            f"adapter.options.{name}={getattr(self, name)} is out of range; "
            "use an integer from 1 to 4096")


@struct.dataclass
class MultitaskPrompt(base.Adapter):
  """Attributes:

    p: `[n, d]`.
    columns: U `[m, n, r]`.
    rows: V `[m, r, d]`.
    rank: `[]` int32.
  """

  p: types.Array = base.trained(None, None)
  columns: types.Array = base.trained(None, None, None)
  rows: types.Array = base.trained(None, None, None)
  rank: types.Array = base.frozen()

  @property
  def tasks(self):
    return self.columns.shape[0]

  def virtual(self):
    own = jnp.matmul(self.columns, self.rows, precision="highest")
    return (self.p * own).reshape(-1, self.p.shape[-1])


def init(key, weight, slot, shared=None):
  """The virtual tokens before the first step."""
  del shared
  options = slot.options
  first, second, third = jax.random.split(key, 3)
  p = prompt.start(first, weight, slot)
  m, r, (n, d) = options.tasks, options.ranks, p.shape
  return MultitaskPrompt(
      p=p, columns=0.02 * jax.random.normal(second, (m, n, r)),
      rows=0.02 * jax.random.normal(third, (m, r, d)), rank=slot.rank)


def _config(config: config_lib.AdapterConfig) -> dict[str, Any]:
  return prompt.config_of(config) | {
      "num_tasks": config.options.tasks, "num_ranks": config.options.ranks}


def _block(config: Mapping[str, Any]) -> dict[str, Any]:
  return {"options": prompt.options_of(config) | {
      "tasks": int(config["num_tasks"]), "ranks": int(config["num_ranks"])}}


def _tensors(adapters: base.Adapters) -> dict[str, Any]:
  one = adapters.outer["prompt"]
  return {"prompt_embeddings": one.p, "prefix_task_cols": one.columns,
          "prefix_task_rows": one.rows}


def _adapters(tensors, config, geometry) -> base.Adapters:
  options = config.options
  m, n, r = options.tasks, options.tokens, options.ranks

  def one(name, *shape):
    return jnp.asarray(tensors[name], jnp.float32).reshape(shape)

  return base.Adapters(outer={"prompt": MultitaskPrompt(
      p=prompt.embeddings(tensors, config, geometry),
      columns=one("prefix_task_cols", m, n, r),
      rows=one("prefix_task_rows", m, r, geometry.d), rank=jnp.int32(1))})


METHOD = method.Method(
    summary="E' = [P * (U_k V_k), E[tokens]] in task k",
    paper="arXiv 2303.02861", adapter=MultitaskPrompt, init=init,
    count="tokens * d + tasks * ranks * (tokens + d)", options=Options,
    targets="prompt", sites=("prompt",), ranked=False, identity_at_init=False,
    mergeable=False, tiny={"options": {"tokens": 3, "tasks": 2, "ranks": 2}},
    form=method.Form(
        peft_type="MULTITASK_PROMPT_TUNING", config=_config, block=_block,
        lists_targets=False, tensors=_tensors, adapters=_adapters))
