"""Modules that are trained whole, beside adapters of others.

Hugging Face PEFT calls them `modules_to_save`: a norm, the head, the
embedding, any projection. They become overrides of the base, in float32; a
quantised weight is dequantised to be trained. The base keeps what it had.

Where the head is tied to the embedding there is one matrix, which
`embed_tokens` names, and it stays one (PEFT's `ensure_weight_tying`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp

from lora_jax import errors
from lora_jax import host as host_lib
from lora_jax import quant
from lora_jax import types

OUTER = ("embed_tokens", "norm", "lm_head")


def overrides(
    tree: types.Tree, names: Sequence[str], adapted: Iterable[str] = (),
    replicated: bool = False,
) -> types.Tree | None:
  """A partial base that holds the named modules, or None for no names.

  Args:
    tree: the base.
    names: targets, such as `lm_head`, `norm`, `input_layernorm`.
    adapted: targets that have an adapter.
    replicated: whether layers share their weights; see `depth`.

  Raises:
    errors.UsageError: if a module is unknown, tied, shared, or adapted too.
  """
  if not names:
    return None
  field = "adapter.modules_to_save"
  known = [*tree.layers, *OUTER]
  for name in names:
    if name not in known:
      raise errors.UsageError(
          f'{field}: "{name}" is unknown{errors.nearest(name, known)}')
    if replicated and name in tree.layers:
      raise errors.UsageError(
          f'{field}: "{name}" is shared by the layers that '
          "adapter.layer_replication repeats; name embed_tokens, norm or "
          "lm_head only")
    if name in adapted:
      raise errors.UsageError(
          f'{field}: "{name}" is adapted, too; take it out of it or of '
          "adapter.targets")
  if "lm_head" in names and tree.lm_head is None:
    raise errors.UsageError(
        f'{field}: "lm_head" is tied to embed_tokens in this model; name '
        "embed_tokens, which trains the one matrix of both")

  def whole(module):
    return jax.tree.map(
        lambda w: jnp.array(quant.dequantize(w, jnp.float32)),
        host_lib.on_device(module),
        is_leaf=lambda x: isinstance(x, quant.QuantizedArray))

  layers = {k: whole(v) if k in names else None
            for k, v in tree.layers.items()}
  return tree.replace(
      layers=layers if any(v is not None for v in layers.values()) else None,
      **{k: whole(getattr(tree, k)) if k in names else None for k in OUTER})
