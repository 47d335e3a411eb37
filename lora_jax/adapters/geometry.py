"""A model's sizes, as methods are told of them."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Geometry:
  """Sizes of a model, by the letters of `types`.

  Attributes:
    d: model width.
    f: MLP width.
    h: query heads.
    k: key and value heads.
    e: width of a head.
    l: layers.
    v: vocabulary.
    embed_scale: of the embeddings as they enter the first layer.
    biased: targets of projections that have a bias.
    parts: what a layer has, as Hugging Face names it: target, module path, and
      "weight" or "bias".
    fused: paths of modules that hold several of these, and their targets.
    p: parameters of a layer.
    norm: a norm's weight that leaves what it norms as it is.
  """

  d: int
  f: int
  h: int
  k: int
  e: int
  l: int  # The glossary's letter.
  v: int
  embed_scale: float = 1.0
  biased: tuple[str, ...] = ()
  parts: tuple[tuple[str, str, str], ...] = ()
  fused: tuple[tuple[str, tuple[str, ...]], ...] = ()
  p: int = 0
  norm: float = 1.0
