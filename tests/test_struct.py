"""Trees of different classes are different, whatever their fields."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import pytest

from lora_jax import quant
from lora_jax import struct
from lora_jax import trees


@struct.dataclass
class One:
  x: jax.Array
  size: int = struct.field(pytree_node=False, default=1)


@struct.dataclass
class Other(One):
  pass


def test_a_class_is_part_of_the_structure():
  one, other = One(jnp.ones(2)), Other(jnp.ones(2))
  assert jax.tree.structure(one) == jax.tree.structure(one.replace(x=0))
  assert jax.tree.structure(one) != jax.tree.structure(one.replace(size=2))
  assert jax.tree.structure(one) != jax.tree.structure(other)
  with pytest.raises(ValueError, match="different types"):
    jax.tree.map(jnp.add, one, other)


def test_formats_with_the_same_fields_differ():
  weight = jnp.linspace(-1, 1, 64 * 8).reshape(64, 8)
  kinds = [jax.tree.structure(quant.quantize(weight, quant.QuantSpec(name)))
           for name in quant.FORMATS]
  assert all(a != b for a, b in itertools.combinations(kinds, 2))


def test_paths_fields_and_values_survive():
  one = One(jnp.arange(3.0), size=4)
  assert list(trees.paths({"a": one})) == ["a.x"]
  leaves, structure = jax.tree.flatten(one)
  again = structure.unflatten(leaves)
  assert isinstance(again, One) and again.size == 4
  assert jax.jit(lambda n: n.replace(x=n.x * n.size))(one).x.tolist() == [
      0, 4, 8]
  with pytest.raises(AttributeError):
    one.size = 5
