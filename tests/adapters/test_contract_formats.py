"""What every projection method promises on every base format.

All formats are in one program, for compiling is most of what this takes.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax.adapters import base as base_lib
from lora_jax.adapters import method as method_lib
from lora_jax.adapters import registry
from lora_jax.adapters import starts
from tests import tiny
from tests.adapters import contract

projecting = pytest.mark.parametrize("method", contract.PROJECTING)
# Under all formats; others under three of them, in turn.
EVERY = "lora", "dora", "ia3", "vera", "oft"


def formats(method):
  if method in EVERY:
    return contract.FORMATS
  turn, others = contract.PROJECTING.index(method), [
      fmt for fmt in contract.FORMATS if fmt not in ("none", "nf4")]
  return ["none", "nf4", others[turn % len(others)]]


class Case:
  """One projection of each format, its adapters at the start and moved."""

  def __init__(self, method, names):
    self.row = row = adapters_lib.METHODS[method]
    config = registry.checked(contract.block(method))
    target = config.targets.split(",")[0]
    self.weights = {
        fmt: contract.one(contract.quantised(fmt).layers[target].weight, 0)
        for fmt in names}
    shape = tuple(self.weights["none"].shape)
    width = config.rank if row.ranked else 1
    # What is shared by modules is counted with the first in some methods.
    self.parameters = registry.count(
        row, config.options, target, shape, width, contract.GEOMETRY, turn=1)
    slot = base_lib.Slot(
        rank=np.int32(width),
        scale=np.float32(row.scale(config.alpha, width, config.options)),
        rate=np.float32(0.5), target=target, width=width, shape=shape,
        options=config.options, start=starts.choose("default"),
        geometry=contract.GEOMETRY)
    self.shared = None if row.share is None else row.share(
        jax.random.key(3), method_lib.Modules(
            {target: shape}, width, config.options, contract.GEOMETRY,
            {target: [width]}, weights={target: self.weights["none"]}))
    self.moved_shared = None if self.shared is None else contract.moved(
        self.shared)
    init = functools.partial(row.init, slot=slot, shared=self.shared)
    self.start = jax.jit(lambda ws: {
        fmt: init(jax.random.key(5), w) for fmt, w in ws.items()})(self.weights)
    self.moved = {fmt: contract.moved(a) for fmt, a in self.start.items()}
    self.x = jax.random.normal(jax.random.key(4), (2, 3, shape[0]))
    # Of a first pass, for those methods that have one.
    self.hidden = jax.random.normal(
        jax.random.key(6), (2, 3, contract.CONFIG.d_model))
    self.bias = jnp.ones(shape[1])

  def told(self, shared, noise=None, hidden=None):
    """What its adapters are bound to."""
    if not self.row.adapter.guided:
      return shared
    return shared.guide(self.hidden if hidden is None else hidden, noise)


@functools.cache
def case(method):
  return Case(method, formats(method))


@projecting
def test_it_starts_as_the_base_and_merging_computes_the_same(method):
  check(case(method))


@pytest.mark.slow  # The same for each format: two seconds a method.
@pytest.mark.parametrize(
    "method", [m for m in contract.PROJECTING if m not in EVERY])
def test_so_it_does_under_every_format(method):
  check(Case(method, contract.FORMATS))


def check(c):

  @jax.jit
  def run(weights, start, moved, shared, moved_shared):
    found, shared, moved_shared = {}, c.told(shared), c.told(moved_shared)
    for fmt, weight in weights.items():
      first, adapter = start[fmt].bound(shared), moved[fmt].bound(moved_shared)
      shift = adapter.shift(c.bias)
      ours = adapter.apply(c.x, weight)
      merged = ours
      if c.row.mergeable:
        merged = jnp.matmul(c.x, adapter.merge(weight), precision="highest")
      found[fmt] = (
          ours + shift, merged + shift,
          first.apply(c.x, weight) + first.shift(c.bias),
          adapters_lib.project(c.x, weight) + c.bias)
    return found

  assert c.start["none"].size() == c.parameters
  found = run(c.weights, c.start, c.moved, c.shared, c.moved_shared)
  for fmt, (ours, merged, start, base) in found.items():
    assert tiny.distance(merged, ours) < 2e-5, fmt
    assert tiny.distance(base, ours) > 1e-3, fmt
    if c.row.identity_at_init:
      assert tiny.distance(base, start) < 1e-5, fmt


@projecting
def test_bfloat16_and_dropout(method):
  """Values and gradients of 16-bit products, with dropout where there is."""
  c = case(method)
  x = c.x.astype(jnp.bfloat16)
  trainable, frozen = adapters_lib.split(c.moved["nf4"])
  shared, known = adapters_lib.split(c.moved_shared)

  def run(trainable, shared, x, hidden, key, examples):
    draw = adapters_lib.Noise(
        jax.random.key(key), jnp.broadcast_to(examples[:, None], (2, 3)),
        jnp.broadcast_to(jnp.arange(3), (2, 3)))
    adapter = adapters_lib.join(trainable, frozen).bound(
        c.told(adapters_lib.join(shared, known), draw, hidden))
    y = adapter.apply(x, c.weights["nf4"], draw)
    y += adapter.shift(c.bias).astype(y.dtype)
    return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

  @jax.jit
  def every(trainable, shared, draws):
    both = jax.value_and_grad(run, (0, 1), has_aux=True)
    return jax.lax.map(lambda draw: both(trainable, shared, *draw), draws)

  # As they are, in another order, and drawn with another key.
  rows, ids = (lambda x: jnp.stack([x, x[::-1], x])), jnp.arange(2)
  (_, (y, swapped, other)), grads = every(
      trainable, shared, (rows(x), rows(c.hidden), jnp.arange(3) // 2,
                          rows(ids)))
  assert y.dtype == jnp.bfloat16 and jnp.isfinite(y).all()
  for leaf in jax.tree.leaves(grads):
    assert leaf.dtype == jnp.float32
    assert jnp.isfinite(leaf).all() and jnp.abs(leaf).max() > 0
  assert tiny.distance(swapped[::-1], y) < 1e-2
  drops = hasattr(c.moved["nf4"], "rate") or c.row.samples
  assert (tiny.distance(other, y) > 2e-2) == drops
