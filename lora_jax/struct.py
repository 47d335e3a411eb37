"""Dataclasses that are trees, as `flax.struct`'s, with their class told apart.

jax compares the structures of two registered dataclasses by their fields
alone, not by their class (`jax.tree_util.register_dataclass`, seen in 0.10.2,
0.11.2 and 0.12.0): NF4 and INT4 weights, or two adapters with the same
fields, are "equal" to the caches of `jax.jit`, and only their hashes differ.
A cache that meets two such keys in one bucket (about one pair in a hundred, by
the addresses of a process) runs one format's program on the other's codes.
Nodes that are registered with functions of their own do compare their class.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, dataclass_transform

from flax import struct
import jax

field = struct.field


def _replace(self: Any, **updates: Any) -> Any:
  """The same with other values of the fields named."""
  return dataclasses.replace(self, **updates)


@dataclass_transform(field_specifiers=(field, dataclasses.field),
                     frozen_default=True)
def dataclass(cls: type | None = None, **options: Any) -> Any:
  """A frozen dataclass that is a tree of its fields.

  Args:
    cls: fields of `field(pytree_node=False)` are static: compared and hashed,
      never traced. The others are children, under their names.
    **options: of `dataclasses.dataclass`.

  Returns:
    The class, with a method `replace(**updates)`; or a decorator, if there is
    no `cls`.
  """
  if cls is None:
    return functools.partial(dataclass, **options)
  cls = dataclasses.dataclass(**{"frozen": True} | options)(cls)
  cls.replace = _replace  # type: ignore[attr-defined]
  children: list[str] = []
  static: list[str] = []
  for one in dataclasses.fields(cls):
    is_child = one.metadata.get("pytree_node", True)
    (children if is_child else static).append(one.name)
  _register(cls, tuple(children), tuple(static))
  return cls


def _register(
    cls: Callable[..., Any], children: tuple[str, ...], static: tuple[str, ...]
) -> None:
  keys = tuple(jax.tree_util.GetAttrKey(name) for name in children)

  def flatten(node):
    return (tuple([getattr(node, name) for name in children]),
            tuple([getattr(node, name) for name in static]))

  def flatten_with_keys(node):
    values, aux = flatten(node)
    return tuple(zip(keys, values)), aux

  def unflatten(aux, values):
    return cls(**dict(zip(children, values)), **dict(zip(static, aux)))

  jax.tree_util.register_pytree_with_keys(
      cls, flatten_with_keys, unflatten, flatten)  # type: ignore[arg-type]
