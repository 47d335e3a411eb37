"""One projection of PEFT against one of ours, for the tests of methods."""

from __future__ import annotations

import collections
import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import adapters as adapters_lib
from lora_jax.adapters import base as base_lib
from lora_jax.adapters import registry
from lora_jax.adapters import starts
from tests import tiny

GEOMETRY = base_lib.Geometry(d=8, f=8, h=1, k=1, e=8, l=1, v=8, biased=(
    "q_proj",))


@dataclasses.dataclass(frozen=True)
class Place:
  """What PEFT made of a config for one `Linear`, as arrays.

  Attributes:
    weight: `[i, o]`.
    bias: `[o]`.
    start: tensors by suffix before the first step.
    tensors: with something added to every trained one.
    x, y: `[2, 3, i]` and `[2, 3, o]`.
    merged: `[i, o]`, or None.
  """

  weight: np.ndarray
  bias: np.ndarray
  start: dict[str, np.ndarray]
  tensors: dict[str, np.ndarray]
  x: np.ndarray
  y: np.ndarray
  merged: np.ndarray | None


def place(config, i, o, mergeable=True) -> Place:
  """A `Linear` of `i` and `o` under a PEFT config that targets q_proj."""
  import peft
  import torch

  torch.manual_seed(0)
  linear = torch.nn.Linear(i, o)
  weight, bias = (x.detach().numpy().copy() for x in (
      linear.weight.T, linear.bias))
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    model = peft.get_peft_model(torch.nn.Sequential(
        collections.OrderedDict(q_proj=linear)), config)

  def tensors():
    found = peft.get_peft_model_state_dict(model)
    return {name.split("q_proj.")[1]: value.numpy().copy()
            for name, value in found.items()}

  start = tensors()
  x = torch.randn(2, 3, i)
  with torch.no_grad():
    for value in model.parameters():
      if value.requires_grad:
        value += 0.3 * torch.randn_like(value)
    moved, y = tensors(), model.eval()(x).numpy()
    merged = None
    if mergeable:
      merged = model.merge_and_unload().q_proj.weight.T.numpy()
  return Place(weight, bias, start, moved, x.numpy(), y, merged)


def slot(method, config, i, o, rank=None) -> base_lib.Slot:
  """Of that place, as `export.peft.read` makes it of the config's file."""
  row = adapters_lib.METHODS[method]
  block = registry.checked(adapters_lib.AdapterConfig(
      **{"method": method} | row.form.block(config.to_dict())))
  rank = rank or (block.rank if row.ranked else 1)
  return base_lib.Slot(
      rank=np.int32(rank),
      scale=np.float32(row.scale(block.alpha, rank, block.options)),
      rate=np.float32(block.dropout), target="q_proj", width=rank,
      shape=(i, o), options=block.options, start=starts.choose("default"),
      geometry=GEOMETRY)


def check(method, config, i, o, tolerance=2e-6):
  """Shapes at the start, the product, the merged weight, and the way back.

  Returns:
    The adapter, and the place.
  """
  row = adapters_lib.METHODS[method]
  there = place(config, i, o, row.mergeable)
  rank = row.adapter.peft_rank(there.tensors)
  where = slot(method, config, i, o, rank)
  fresh = row.init(jax.random.key(0), jnp.asarray(there.weight), where)
  assert {k: v.shape for k, v in fresh.to_peft().items()} == {
      k: v.shape for k, v in there.start.items()}
  kind = row.kind(where) if row.kind else row.adapter
  adapter = kind.from_peft(there.tensors, where)
  assert jax.tree.structure(adapter) == jax.tree.structure(fresh)
  y = adapter.apply(there.x, there.weight) + adapter.shift(there.bias)
  assert tiny.distance(y, there.y) < tolerance
  assert tiny.distance(there.x @ there.weight + there.bias, there.y) > 1e-2
  if there.merged is not None:
    assert tiny.distance(
        adapter.merge(jnp.asarray(there.weight)), there.merged) < tolerance
  back = adapter.to_peft()
  assert back.keys() == there.tensors.keys()
  for name, value in there.tensors.items():
    np.testing.assert_array_equal(back[name], value, name)
  options = registry.checked(adapters_lib.AdapterConfig(
      method=method, rank=int(where.rank), options=where.options)).options
  assert adapter.size() == registry.count(
      row, options, "q_proj", (i, o), int(where.rank), GEOMETRY)
  return adapter, there


def start_distance(method, config, i, o):
  """How far a new adapter's product is from the frozen weight's."""
  there = place(config, i, o, mergeable=False)
  row = adapters_lib.METHODS[method]
  fresh = row.init(
      jax.random.key(0), jnp.asarray(there.weight),
      slot(method, config, i, o))
  return tiny.distance(
      fresh.apply(there.x, there.weight), there.x @ there.weight)
