"""SHiRA: sparse high-rank adapters (Bhardwaj et al. 2024, arXiv 2406.13175).

  h = x (W0 + S),  S `[i, o]` with r (i + o) entries that are not zero

Which ones is drawn once, uniformly and the same for all matrices of a shape, by
torch's generator as Hugging Face PEFT draws them, and kept in the file. They
start at 0.

Trainable parameters: r (i + o) a matrix, as many as LoRA's.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import errors
from lora_jax import quant
from lora_jax import struct
from lora_jax import types
from lora_jax.adapters import base
from lora_jax.adapters import config as config_lib
from lora_jax.adapters import method
from lora_jax.adapters import pieces
from lora_jax.adapters import torch_random


@dataclasses.dataclass(frozen=True)
class Options:
  """Attributes:

    random_seed: of the draw; -1 is that of a generator nobody has seeded.
  """

  random_seed: int = -1


@struct.dataclass
class SHiRA(base.Adapter):
  """Attributes:

    values: `[n]`, n = r (i + o).
    index: `[2, n]` int32, (output, input) of each.
    rank: `[]` int32, 0: not adapted.
    shape: static, (i, o).
  """

  values: types.Array = base.up(None)
  index: types.Array = base.frozen(None, None)
  rank: types.Array = base.frozen()
  shape: tuple[int, int] = base.static(default=(0, 0))

  def delta(self) -> jax.Array:
    """S, `[i, o]` float32."""
    values = self.active(self.values, 0.0)
    return jnp.zeros(self.shape).at[self.index[1], self.index[0]].add(values)

  def apply(self, x, weight, noise=None):
    del noise
    return quant.matmul(x, weight) + pieces.dense(x, SHiRA.delta, self)

  def merge(self, weight):
    return quant.dequantize(weight, jnp.float32) + self.delta()

  def to_peft(self, embedding=False):
    return {"shira_weight": self.values, "shira_indices": self.index}

  @classmethod
  def from_peft(cls, tensors, slot):
    return cls(values=jnp.asarray(tensors["shira_weight"], jnp.float32),
               index=jnp.asarray(tensors["shira_indices"], jnp.int32),
               rank=slot.rank, shape=slot.shape)

  @classmethod
  def peft_rank(cls, tensors):
    del tensors
    return None


@functools.lru_cache(maxsize=16)
def places(i: int, o: int, n: int, seed: int) -> np.ndarray:
  """(output, input) of n of the i o entries, `[2, n]` int32, row by row."""
  generator = (torch_random.Generator() if seed == -1
               else torch_random.Generator(seed))
  flat = np.sort(generator.randperm(i * o, first=n))
  return np.stack(np.divmod(flat, i)).astype(np.int32)


def init(key, weight, slot, shared=None):
  """The adapter of one module before the first step.

  Raises:
    errors.UsageError: if there are more entries to train than there are.
  """
  del key, shared
  i, o = weight.shape[-2:]
  n = slot.width * (i + o)
  if n > i * o:
    raise errors.UsageError(
        f"adapter.rank={slot.width}: {n} entries of {slot.target}, which has "
        f"{i * o}; use a smaller rank")
  index = places(i, o, n, slot.options.random_seed)
  return SHiRA(values=jnp.zeros(n, jnp.float32), index=jnp.asarray(index),
               rank=slot.rank, shape=(i, o))


def _config(config: config_lib.AdapterConfig) -> dict[str, Any]:
  seed = config.options.random_seed
  return {"r": config.rank, "mask_type": "random",
          "random_seed": None if seed == -1 else seed,
          "fan_in_fan_out": False, "init_weights": True}


def _block(config: Mapping[str, Any]) -> dict[str, Any]:
  seed = config.get("random_seed")
  return {"rank": int(config["r"]),
          "options": {"random_seed": -1 if seed is None else seed}}


METHOD = method.Method(
    summary="h = x (W0 + S), S sparse", paper="arXiv 2406.13175",
    adapter=SHiRA, init=init, count="r * (i + o)", options=Options,
    form=method.Form(
        peft_type="SHIRA", config=_config, block=_block,
        neutral={"fan_in_fan_out": (False,)}))
