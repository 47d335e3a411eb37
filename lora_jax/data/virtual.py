"""Places for virtual tokens before every example.

What stands there is an adapter's (`adapters.prompt`): row j of it has the id
-1 - j. Being tokens, they are packed, numbered, cached and masked as others.
An adapter of several tasks has n rows of each: row j of task k has the id
-1 - (k n + j).
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses

import numpy as np

from lora_jax import errors
from lora_jax.data import dataset
from lora_jax.data import templates


def ids(n: int, task: int = 0) -> np.ndarray:
  """Of one task's n virtual tokens, int32: -1, -2, ..., -n of the first."""
  return -1 - task * n - np.arange(n, dtype=np.int32)


def ahead(
    rows: Sequence[templates.Encoded], n: int, tasks: int = 1,
    labels: tuple[np.ndarray, np.ndarray] | None = None,
) -> dataset.Dataset:
  """Examples with n virtual tokens before each.

  The first real token still carries no loss, so that losses compare with
  those of methods that have no virtual tokens.

  Args:
    rows: the examples.
    n: virtual tokens.
    tasks: of the adapter; with one, an example's task means nothing.
    labels: real tokens [n] to predict in their places, and the weights [n] of
      doing so; None if there are none.

  Raises:
    errors.UserError: if an example is of none of several tasks.
  """
  data = dataset.of(rows)
  if not n:
    return data

  def task(one, index):
    if tasks == 1:
      return 0
    if one.task is None or not 0 <= one.task < tasks:
      raise errors.UserError(
          f"{one.source or f'example {index}'}: task_id={one.task} is none of "
          f"adapter.options.tasks={tasks}; give every row an integer task_id "
          f"from 0 to {tasks - 1}")
    return one.task

  known, weights = labels or (None, np.zeros(n, np.float32))
  return dataclasses.replace(data, encoded=tuple(
      dataclasses.replace(
          one, tokens=np.concatenate([ids(n, task(one, index)), one.tokens]),
          weights=np.concatenate([
              weights, np.zeros(1, np.float32), one.weights[1:]]),
          labels=None if known is None else np.concatenate(
              [known, one.tokens]))
      for index, one in enumerate(data.encoded)))
