"""Shared vocabulary: the axis-letter glossary and the types every floor uses.

Shapes are written with one letter an axis, everywhere in this codebase:

  b  rows of a batch          h  query heads         l  layers (stacked)
  t  tokens of a row          k  key/value heads     r  adapter rank
  s  key positions (cache)    e  width of one head   v  vocabulary
  d  model width              f  MLP width           i, o  in/out features
  q  quantisation blocks along `i`

Weights are stored `[i, o]`, so a projection is `x @ w`. Layers are stacked on
a leading `l` axis and scanned over.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from lora_jax import struct

Array: TypeAlias = Any  # A jax.Array, or a np.ndarray on the host.
Tree: TypeAlias = Any  # A pytree of arrays.


@struct.dataclass
class Batch:
  """One batch of token rows; every field is `[b, t]` (or `[a, b, t]`).

  Targets are already shifted: `targets[:, j]` is the token after
  `tokens[:, j]` in the same segment.

  Attributes:
    tokens: int32, input token ids; padding holds any valid id.
    targets: int32, the next token of the same segment.
    loss_weights: float32, weight of predicting `targets`; 0 on prompts,
      padding and the last token of a segment.
    positions: int32, position within the segment (restarts at 0).
    segment_ids: int32, 0 on padding, 1, 2, ... for the packed segments.
    example_ids: int32, global index of the example a token came from (-1 on
      padding). Randomness is folded over it, so that packing, accumulation
      and sharding do not change a token's dropout mask.
  """

  tokens: Array
  targets: Array
  loss_weights: Array
  positions: Array
  segment_ids: Array
  example_ids: Array
