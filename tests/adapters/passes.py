"""For methods that read the rows before the model does: X-LoRA, ShadowPEFT."""

from __future__ import annotations

import dataclasses
import functools
import types

import jax
import numpy as np

from lora_jax import adapters as adapters_lib
from lora_jax import api
from lora_jax import trees
from lora_jax.data import dataset
from lora_jax.data import templates
from lora_jax.evaluate import generate
from lora_jax.models import cache as cache_lib
from lora_jax.models import decoder
from lora_jax.train import step as step_lib
from tests import tiny
from tests.adapters import contract

CONFIG = contract.CONFIG


@functools.cache
def xlora(**options):
  """(base, adapters that matter) of X-LoRA of two projections."""
  block = contract.block("xlora", targets="q_proj,up_proj,down_proj", options={
      "experts": 3, "depth": 2, "size": 8, "layerwise": True} | options)
  base, tree = adapters_lib.build(
      jax.random.key(1), block, contract.quantised("none"),
      tiny.paths(CONFIG), geometry=contract.GEOMETRY)
  return base, contract.moved(tree, 0.3)


@jax.jit
def cached(base, tree, tokens, positions, segments, cache):
  """Logits of tokens after those of a cache, and the next one."""
  hidden, cache = decoder.forward(
      CONFIG, base, tree, tokens, positions, segments, cache=cache)
  return decoder.unembed(CONFIG, base, tree, hidden), cache


def check_cache(base, tree, tokens, whole, cache):
  """Rows of unequal length, by a prompt and then by token; one that stops; a
  cache that grows: what passes over whole rows give.

  Args:
    base, tree: the model's.
    tokens: `[3, 20]`.
    whole: their logits.
    cache: an empty one, for 10 tokens.

  Returns:
    The cache at the end.
  """
  lengths = np.asarray([7, 3, 5])
  at = np.tile(np.arange(7, dtype=np.int32), (3, 1))
  found, cache = cached(
      base, tree, tokens[:, :7], at,
      (at < lengths[:, None]).astype(np.int32), cache)
  for i, n in enumerate(lengths):
    assert tiny.distance(found[i, :n], whole[i, :n]) < 2e-5
  for step in range(8):
    if step == 2:
      cache = cache_lib.grown(cache, 16)
    place = lengths[:, None] + step
    alive = np.ones_like(place)
    alive[2] = step < 3
    found, cache = cached(
        base, tree, np.take_along_axis(tokens, place, 1), place, alive, cache)
    for i in np.flatnonzero(alive):
      assert tiny.distance(found[i, 0], whole[i, place[i, 0]]) < 2e-5
  for one in (cache, cache.first):
    np.testing.assert_array_equal(one.length, [15, 11, 8])
  return cache


@functools.partial(jax.jit, static_argnames=("remat", "tiles", "noise"))
def gradient(tree, base, data, remat="none", tiles=1, noise=False):
  trainable, frozen = adapters_lib.split(tree)
  return step_lib.loss_and_grads(
      trainable, frozen, base, data, jax.random.key(0), model=CONFIG,
      settings=step_lib.Settings(remat=remat, mlp_tiles=tiles, noise=noise))


def check_gradients(base, tree, noise, **how):
  """They do not depend on what is kept, tiles of tokens, the order of rows and
  micro-batches."""
  data = contract.batch()
  value, grads = gradient(tree, base, contract.stacked(data), noise=noise)
  micro = jax.tree.map(lambda x: x[::-1, None], data)
  other, others = gradient(tree, base, micro, noise=noise, **how)
  np.testing.assert_allclose(other, value, rtol=2e-6)
  paths = trees.paths(others)
  for path, leaf in trees.paths(grads).items():
    assert np.abs(leaf).max() > 0, path
    assert tiny.distance(paths[path], leaf) < 2e-5, path
  if noise:
    plain, _ = gradient(tree, base, contract.stacked(data))
    assert abs(plain - value) > 1e-3


def check_generation(base, tree):
  """What is generated from caches is what passes over whole rows give."""
  prompts = [[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5]]
  config = dataclasses.replace(CONFIG, max_position=64)
  found = generate.generate(config, base, tree, prompts, max_new_tokens=9)
  for row, new in zip(prompts, found, strict=True):
    tokens = np.asarray([row + new], np.int32)
    at = np.arange(tokens.shape[1], dtype=np.int32)[None]
    logits = tiny.logits(CONFIG, base, tokens, at, np.ones_like(at), tree)
    assert np.argmax(logits[0, len(row) - 1:-1], -1).tolist() == new
  assert found != generate.generate(
      config, base, None, prompts, max_new_tokens=9)


def whole():
  """(an `api.Model` without a tokenizer, rows to train it on)."""
  model = api.Model(
      config=dataclasses.replace(CONFIG, max_position=64),
      base=contract.quantised("none"),
      tokenizer=types.SimpleNamespace(chat_template=None, eos_token_id=0),
      fingerprint="0" * 64, source="tiny")
  return model, dataset.of([templates.Encoded(
      tokens=np.arange(n, dtype=np.int32), weights=np.ones(n, np.float32))
      for n in (9, 5, 7)])
