"""Trainable rows: a few tokens' embeddings, trained whole.

  E'[i] = rows[n] where index[n] = i, E[i] elsewhere

New chat tokens learn what they mean while the rest of the vocabulary stays
frozen. A head that is tied to the embedding follows it; one that is not has
rows of its own. Hugging Face PEFT calls them `trainable_token_indices`.

Trainable parameters: n d for the embedding, as many for an untied head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp

from lora_jax import errors
from lora_jax import quant
from lora_jax import struct
from lora_jax import types
from lora_jax.adapters import base


@struct.dataclass
class TokenRows(base.Adapter):
  """Attributes:

    rows: `[n, d]`, float32.
    index: `[n]` int32, ascending: which tokens' they are.
    head: whether they belong to the head `[d, v]`, not the table `[v, d]`.
  """

  rows: types.Array
  index: types.Array = base.frozen()
  head: bool = struct.field(pytree_node=False, default=False)

  follows_tie: ClassVar[bool] = True

  def lookup(self, tokens: types.Array, table: types.Array) -> types.Array:
    """Adapted embedding rows, `[..., d]` for `tokens [...]`."""
    hit = tokens[..., None] == self.index
    ours = jnp.take(self.rows, jnp.argmax(hit, -1), axis=0)
    return jnp.where(hit.any(-1, keepdims=True), ours,
                     jnp.take(table, tokens, axis=0))

  def tied_logits(self, x, logits):
    ours = x @ self.rows.T.astype(x.dtype)
    return logits.at[..., self.index].set(ours.astype(logits.dtype))

  def apply(self, x, weight, noise=None):
    del noise  # There is no dropout of rows.
    return self.tied_logits(x, quant.matmul(x, weight))

  def merge(self, weight):
    weight = quant.dequantize(weight, jnp.float32)
    if self.head:
      return weight.at[:, self.index].set(self.rows.T)
    return weight.at[self.index].set(self.rows)

  def rate_groups(self, embedding: bool = False) -> base.Adapter:
    del embedding  # They learn at A's rate, as in PEFT.
    return super().rate_groups()

  def to_peft(self, embedding: bool = False) -> dict[str, types.Array]:
    del embedding
    return {"token_adapter.trainable_tokens_delta": self.rows}


def init(weight: types.Tree, indices: Sequence[int], head: bool) -> TokenRows:
  """Rows as they are in a table `[v, d]` or a head `[d, v]`.

  Raises:
    errors.UsageError: if an index is no token's, or there twice.
  """
  size = weight.shape[-1] if head else weight.shape[0]
  ordered = sorted(indices)
  if len(set(ordered)) < len(ordered) or not all(
      0 <= i < size for i in ordered):
    raise errors.UsageError(
        f"adapter.trainable_token_indices={','.join(map(str, indices))}: give "
        f"every token once, from 0 to {size - 1}")
  index = jnp.asarray(ordered, jnp.int32)
  if head:
    rows = quant.dequantize(weight, jnp.float32)[:, index].T
  else:
    rows = jnp.asarray(weight)[index].astype(jnp.float32)
  return TokenRows(rows=jnp.array(rows), index=index, head=head)


def build(
    tree: types.Tree, indices: Sequence[int], taken: Sequence[str]
) -> dict[str, TokenRows]:
  """Rows of the embedding, and of the head if it is another matrix.

  Args:
    tree: the base.
    indices: the tokens.
    taken: outer modules that are trained otherwise.

  Returns:
    By target, for `Adapters.outer`.

  Raises:
    errors.UsageError: see `init`; and if the embedding is taken.
  """
  if not indices:
    return {}
  if "embed_tokens" in taken:
    raise errors.UsageError(
        "adapter.trainable_token_indices: embed_tokens is trained otherwise, "
        "too; take it out of adapter.targets and adapter.modules_to_save")
  found = {"embed_tokens": init(tree.embed_tokens, indices, head=False)}
  if tree.lm_head is not None and "lm_head" not in taken:
    found["lm_head"] = init(tree.lm_head.weight, indices, head=True)
  return found


def embedding_index(adapters: base.Adapters) -> list[int]:
  """The tokens whose embeddings `adapters` trains."""
  rows = adapters.outer.get("embed_tokens")
  if not isinstance(rows, TokenRows):
    return []
  return jax.device_get(rows.index).tolist()
