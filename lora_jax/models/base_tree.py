"""The structure of a base as JSON, and back.

  Linear(weight=NF4(codes=[2, 12, 24] uint8, ..., block_size=64), bias=None)
  {"class": "Linear", "fields": {
      "weight": {"class": "NF4", "static": {"block_size": 64}, "fields": {
          "codes": {"shape": [2, 12, 24], "dtype": "uint8"}, ...}},
      "bias": null}}
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from lora_jax import errors
from lora_jax import quant
from lora_jax import types
from lora_jax.models import decoder
from lora_jax.quant import double

T = TypeVar("T")


def _subclasses(cls: type[T]) -> Iterator[type[T]]:
  yield cls
  for sub in cls.__subclasses__():
    yield from _subclasses(sub)


def classes() -> dict[str, type]:
  """What a base may be made of by name; every format is one of them."""
  own: tuple[type, ...] = (decoder.Base, decoder.Linear, double.Nested)
  return {c.__name__: c for c in (*own, *_subclasses(quant.QuantizedArray))}


def describe(node: Any) -> Any:
  """JSON of a tree of dicts, known dataclasses, arrays and None.

  Raises:
    errors.UserError: if it holds something else.
  """
  if node is None:
    return None
  if isinstance(node, dict):
    return {"dict": {k: describe(v) for k, v in node.items()}}
  if not dataclasses.is_dataclass(node) and hasattr(node, "dtype"):
    return {"shape": list(node.shape), "dtype": jnp.dtype(node.dtype).name}
  name = type(node).__name__
  if classes().get(name) is not type(node):
    raise errors.UserError(
        f"a base with a {name} in it cannot be stored; known: "
        f"{', '.join(sorted(classes()))}")
  traced = {f.name: f.metadata.get("pytree_node", True)
            for f in dataclasses.fields(classes()[name])}
  return {
      "class": name,
      "static": {k: getattr(node, k) for k, v in traced.items() if not v},
      "fields": {
          k: describe(getattr(node, k)) for k, v in traced.items() if v}}


def template(node: Any) -> types.Tree:
  """The tree that `describe` described, of `jax.ShapeDtypeStruct`s."""
  if node is None:
    return None
  if "dict" in node:
    return {k: template(v) for k, v in node["dict"].items()}
  if "class" not in node:
    return jax.ShapeDtypeStruct(tuple(node["shape"]), jnp.dtype(node["dtype"]))
  fields = {k: template(v) for k, v in node["fields"].items()}
  return classes()[node["class"]](**fields, **node["static"])
