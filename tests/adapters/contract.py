"""A tiny model under every method and format, for the tests of the contract."""

from __future__ import annotations

import functools

import jax
import numpy as np

from lora_jax import adapters as adapters_lib
from lora_jax import quant
from lora_jax import types
from lora_jax.models import beside
from lora_jax.models import config as config_lib
from lora_jax.models import decoder
from lora_jax.models import init
from lora_jax.models import modules
from lora_jax.train import step as step_lib
from tests import tiny

CONFIG = config_lib.ModelConfig(
    family="llama", vocab_size=31, d_model=32, d_ff=48, n_layers=3, n_heads=4,
    n_kv_heads=2, head_dim=8, tie_embeddings=False, qkv_bias=True)
GEOMETRY = modules.geometry(CONFIG)
METHODS = sorted(m for m in adapters_lib.METHODS if m != "none")
ADAPTING = [m for m in METHODS if adapters_lib.METHODS[m].adapter]
# Those of projections, which every format of the base concerns.
PROJECTING = [m for m in ADAPTING if not adapters_lib.METHODS[m].sites]
# What a method may have that concerns more than one place, or its weight alone.
HOOKS = ("bound", "guide", "prepared", "constants", "finish", "shift", "share")


def alike(method):
  """Whether a whole model has nothing of a method that one place has not.

  Of these whole models are slow tests: each takes some seconds to compile, and
  test_contract_formats.py has a place of every method under every format.
  """
  row = adapters_lib.METHODS[method]
  if method not in PROJECTING or row.share is not None or row.mixes_tokens:
    return False
  return not any(hook in vars(kind) for kind in row.adapter.__mro__
                 if kind is not adapters_lib.Adapter for hook in HOOKS)


FORMATS = ["none", *sorted(quant.FORMATS)]


@functools.cache
def quantised(fmt):
  base = quantised("none") if fmt != "none" else init.random_base(
      jax.random.key(0), CONFIG)
  if fmt == "none":
    return base
  spec = quant.QuantSpec(format=fmt, block_size=32)
  layers = {
      name: one.replace(weight=quant.quantize(one.weight, spec))
      if isinstance(one, decoder.Linear) else one
      for name, one in base.layers.items()}
  return base.replace(layers=layers)


def block(method, **fields):
  """An adapter block that fits the model, with as much in it as it can have."""
  row = adapters_lib.METHODS[method]
  found = {"method": method, "rank": 4, "alpha": 8.0}
  if row.adapter and not row.sites:
    # Not all: what is compiled is most of what the tests take.
    targets = ("q_proj,up_proj,down_proj" if row.targets == "all-linear"
               else row.targets)
    found["targets"] = ",".join(
        [targets] + ["lm_head"] * (not row.mixes_tokens)
        + ["embed_tokens"] * row.embeddings)
    if row.patterns:
      found["rank_pattern"] = {"layers.1.mlp.up_proj": 2}
  return adapters_lib.AdapterConfig(**found | dict(row.tiny) | fields)


@functools.cache
def built(method, fmt):
  return adapters_lib.build(
      jax.random.key(1), block(method), quantised(fmt), tiny.paths(CONFIG),
      geometry=GEOMETRY)


def randomised(method, fmt):
  """(base, adapters) with every trained leaf moved off its start."""
  base, tree = built(method, fmt)
  tree = moved(tree)
  return base, tree if method == "full" else tiny.mask(tree)


def moved(tree, scale=0.1):
  """Adapters with something added to every trained leaf."""
  trainable, frozen = adapters_lib.split(tree)
  leaves, structure = jax.tree.flatten(trainable)
  rng = np.random.default_rng(2)
  drawn = [x + scale * rng.standard_normal(x.shape, np.float32)
           for x in leaves]
  return adapters_lib.join(structure.unflatten(drawn), frozen)


@functools.cache
def batch(virtual=0):
  """Two packed rows of two examples, with virtual tokens before each."""
  rng = np.random.default_rng(0)
  rows = rng.integers(0, CONFIG.vocab_size, (2, 12)).astype(np.int32)
  parts = []
  for number, part in enumerate((rows[:, :7], rows[:, 7:]), 1):
    n = part.shape[1] + virtual
    ahead = np.tile(-1 - np.arange(virtual, dtype=np.int32), (2, 1))
    weights = np.arange(n) >= virtual
    weights[-1] = number == 2  # The next example is not its target.
    parts.append((
        np.concatenate([ahead, part], 1), weights, np.arange(n),
        np.full(n, number)))
  tokens = np.concatenate([p[0] for p in parts], 1)
  weights, positions, segments = (
      np.tile(np.concatenate([p[i] for p in parts]), (2, 1)) for i in (1, 2, 3))
  segments = segments.astype(np.int32)
  return types.Batch(
      tokens=tokens, targets=np.maximum(np.roll(tokens, -1, 1), 0),
      loss_weights=weights.astype(np.float32),
      positions=positions.astype(np.int32), segment_ids=segments,
      example_ids=segments + 10 * np.arange(2, dtype=np.int32)[:, None])


def batch_of(tree):
  return batch(adapters_lib.virtual_tokens(tree))


def logits(base, tree):
  """Of the real tokens `[2, 12, v]`."""
  data = batch_of(tree)
  found = np.asarray(_logits(base, tree, data))
  return found[data.tokens >= 0].reshape(2, 12, -1)


@jax.jit
def _logits(base, tree, data):
  hidden, _ = decoder.forward(
      CONFIG, base, tree, data.tokens, data.positions, data.segment_ids)
  return decoder.unembed(CONFIG, base, tree, hidden)


def told(base, tree, data):
  """Adapters that know all of the batch that a layer of theirs has to."""
  if not adapters_lib.is_guided(tree):
    return tree
  hidden, _ = decoder.forward(
      CONFIG, base, adapters_lib.unguided(tree), data.tokens, data.positions,
      data.segment_ids)
  return adapters_lib.guided(tree, hidden)


def begun(base, tree, data):
  """The state beside the hidden states, if adapters have one."""
  state, _ = beside.begun(
      decoder.forward, CONFIG, base, tree, data.tokens, data.positions,
      data.segment_ids)
  return state


@functools.partial(jax.jit, static_argnames=("noise", "dtype"))
def gradient(trainable, frozen, base, data, key, noise=False,
             dtype="float32"):
  return step_lib.loss_and_grads(
      trainable, frozen, base, data, key, model=CONFIG,
      settings=step_lib.Settings(dtype=dtype, noise=noise))


def stacked(data):
  return jax.tree.map(lambda x: x[None], data)


def one(tree, i):
  return jax.tree.map(lambda x: x[i], tree)
