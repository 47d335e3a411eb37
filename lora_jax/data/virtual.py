"""Places for virtual tokens before every example.

What stands there is an adapter's (`adapters.prompt`): row j of it has the id
-1 - j. Being tokens, they are packed, numbered, cached and masked as others.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses

import numpy as np

from lora_jax.data import dataset
from lora_jax.data import templates


def ids(n: int) -> np.ndarray:
  """-1, -2, ..., -n, int32."""
  return -1 - np.arange(n, dtype=np.int32)


def ahead(rows: Sequence[templates.Encoded], n: int) -> dataset.Dataset:
  """Examples with n virtual tokens before each.

  The first real token still carries no loss, so that losses compare with
  those of methods that have no virtual tokens.
  """
  data = dataset.of(rows)
  if not n:
    return data
  return dataclasses.replace(data, encoded=tuple(
      dataclasses.replace(
          one, tokens=np.concatenate([ids(n), one.tokens]),
          weights=np.concatenate([np.zeros(n + 1, np.float32),
                                  one.weights[1:]]))
      for one in data.encoded))
