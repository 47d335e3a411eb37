"""Loss and perplexity of held-out rows."""

from __future__ import annotations

from collections.abc import Iterable
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from lora_jax import mesh as mesh_lib
from lora_jax import types
from lora_jax.kernels import attention as attention_lib
from lora_jax.models import config as config_lib
from lora_jax.models import decoder
from lora_jax.models import sharding
from lora_jax.train import loss

PACKED = attention_lib.Options(layout="packed")


@dataclasses.dataclass(frozen=True)
class RowLosses:
  """Losses of an evaluation set, one entry a row.

  Attributes:
    nll: `[n]` float64, sum of weight * nll over the row's tokens; nats.
    weight: `[n]` float64, sum of the weights (tokens, usually).
  """

  nll: np.ndarray
  weight: np.ndarray

  @property
  def loss(self) -> float:
    """Mean nats a token over the whole set."""
    return float(self.nll.sum() / self.weight.sum())

  @property
  def perplexity(self) -> float:
    return float(np.exp(self.loss))


@functools.partial(
    jax.jit, static_argnames=("model", "dtype", "mesh", "attention"))
def row_nll(
    adapter_tree: types.Tree,
    base: types.Tree,
    batch: types.Batch,
    *,
    model: config_lib.ModelConfig,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    attention: attention_lib.Options = PACKED,
) -> tuple[jax.Array, jax.Array]:
  """(sum of weight * nll, sum of weight) of every row, `[b]` each.

  Args:
    adapter_tree: whole adapters, or None.
    base: the frozen base.
    batch: `[b, t]`.
    model: static.
    dtype: static, compute type.
    mesh: static, see `decoder.forward`.
    attention: static, what computes attention, and the layout of the rows.
  """
  hidden, _ = decoder.forward(
      model, base, adapter_tree, batch.tokens, batch.positions,
      batch.segment_ids, dtype=dtype, mesh=mesh, attention=attention)
  head_base, head_adapters = decoder.head_parts(base, adapter_tree)
  head_base = sharding.gathered(mesh, head_base, dtype)
  head_adapters = sharding.gathered(mesh, head_adapters)
  b, t = batch.tokens.shape
  size = loss.chunk_size(b * t, model.vocab_size, mesh_lib.ways(mesh))

  def one(xs):
    h, targets = xs
    logits = decoder.unembed(model, head_base, head_adapters, h)
    return loss.token_nll(logits, targets)

  nll = jax.lax.map(one, loss.chunks((hidden, batch.targets), size))
  nll = jnp.moveaxis(nll, 0, 1).reshape(b, -1)[:, :t]
  weights = batch.loss_weights
  return jnp.sum(nll * weights, -1), jnp.sum(weights, -1)


def row_losses(
    adapter_tree: types.Tree,
    base: types.Tree,
    batches: Iterable[tuple[types.Batch, np.ndarray]],
    *,
    model: config_lib.ModelConfig,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    attention: attention_lib.Options = PACKED,
) -> RowLosses:
  """Losses of every row of `batches`, in the order of their indices.

  Args:
    adapter_tree: whole adapters, or None.
    base: the frozen base.
    batches: `(batch [b, t], indices [n <= b])`; rows past `n` are padding.
    model: the architecture.
    dtype: compute type.
    mesh: the devices that everything is spread over, or None for one.
    attention: what computes attention, and the layout of the rows.

  Returns:
    One entry for each index, from 0 to the largest.
  """
  found = {}
  for batch, indices in batches:
    nll, weight = row_nll(
        adapter_tree, base, batch, model=model, dtype=dtype, mesh=mesh,
        attention=attention)
    nll, weight = (
        mesh_lib.fetch(x).astype(np.float64) for x in (nll, weight))
    rows = zip(indices.tolist(), nll, weight)
    found.update({index: (n, w) for index, n, w in rows})
  ordered = np.asarray([found[i] for i in range(len(found))])
  return RowLosses(nll=ordered[:, 0], weight=ordered[:, 1])
