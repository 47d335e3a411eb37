"""Padded, packed and cached passes equal a plain one; scan equals a loop."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import adapters as adapters_lib
from lora_jax.adapters import lora
from lora_jax.kernels import attention
from lora_jax.models import cache as cache_lib
from lora_jax.models import decoder
from lora_jax.models import init
from lora_jax.models import layers
from lora_jax.models import rope
from tests.models import tiny

TOLERANCE = 2e-5


def _rows(row, lengths, t, fill):
  """Right-padded `[b, t]` tokens, positions and segments of prefixes."""
  b = len(lengths)
  tokens = np.full((b, t), fill, np.int32)
  positions = np.zeros((b, t), np.int32)
  segments = np.zeros((b, t), np.int32)
  for i, n in enumerate(lengths):
    tokens[i, :n] = row[0, :n]
    positions[i, :n] = np.arange(n)
    segments[i, :n] = 1
  return tokens, positions, segments


def test_left_and_right_padding(model, row, plain):
  config, base = model
  n, t = 17, row.shape[1]
  right = _rows(np.asarray(row), [n], t, fill=7)
  left = [np.roll(x, t - n, axis=1) for x in right]
  # One by one, as `plain`, whose program this is.
  first, second = (
      tiny.logits(config, base, *rows)[0] for rows in (right, left))
  assert np.isfinite(first).all() and np.isfinite(second).all()
  assert tiny.distance(first[:n], plain[:n]) <= TOLERANCE
  assert tiny.distance(second[t - n:], plain[:n]) <= TOLERANCE


def test_packed_segments_and_no_leaks(model, row, plain):
  config, base = model
  lengths, t = [11, 7], row.shape[1]
  tokens = np.zeros((1, t), np.int32)
  positions, segments = np.zeros_like(tokens), np.zeros_like(tokens)
  first = 0
  for index, n in enumerate(lengths):
    span = slice(first, first + n)
    tokens[0, span] = np.asarray(row)[0, :n]
    positions[0, span] = np.arange(n)
    segments[0, span] = index + 1
    first += n
  out = np.asarray(tiny.logits(config, base, tokens, positions, segments))
  assert tiny.distance(out[0, :11], plain[:11]) <= TOLERANCE
  assert tiny.distance(out[0, 11:18], plain[:7]) <= TOLERANCE
  for changed, kept in ((slice(0, 11), slice(11, 18)),
                        (slice(11, 24), slice(0, 11))):
    other = tokens.copy()
    other[0, changed] = (other[0, changed] + 1) % tiny.VOCAB
    moved = np.asarray(
        tiny.logits(config, base, other, positions, segments))
    np.testing.assert_array_equal(moved[0, kept], out[0, kept])
    assert (moved[0, changed] != out[0, changed]).all(-1).any()


def test_cached_decoding_of_unequal_rows(model, row, plain):
  config, base = model
  lengths = [9, 3, 12]
  cache = cache_lib.init_cache(config, 3, 20)
  out, cache = tiny.cached_logits(
      config, base, *_rows(np.asarray(row), lengths, 12, fill=5), cache)
  for i, n in enumerate(lengths):
    assert tiny.distance(out[i, :n], plain[:n]) <= TOLERANCE
  for step in range(6):
    at = np.asarray(lengths)[:, None] + step
    alive = np.ones_like(at)
    alive[2] = step < 4  # A row that has stopped stores nothing more.
    out, cache = tiny.cached_logits(
        config, base, np.asarray(row)[0][at], at, alive, cache)
    for i in range(3):
      if alive[i, 0]:
        assert tiny.distance(out[i, 0], plain[at[i, 0]]) <= TOLERANCE
  np.testing.assert_array_equal(cache.length, [15, 9, 16])
  np.testing.assert_array_equal(
      cache.segment_ids.sum(1), [15, 9, 16])


def test_scan_equals_a_loop(model, row, plain):
  config, base = model
  positions = jnp.arange(row.shape[1])[None]
  ones = jnp.ones_like(row)

  @jax.jit
  def loop(base):
    cos, sin = rope.tables(config.rope, config.head_dim, positions)
    context = decoder.Context(
        cos, sin, positions, ones, positions, ones,
        local=config.local_rope and rope.tables(
            config.local_rope, config.head_dim, positions))
    hidden = base.embed_tokens[row] * (config.embed_scale or 1)
    windows = config.windows() or (None,) * config.n_layers
    for i in range(config.n_layers):
      weights = jax.tree.map(lambda x: x[i], base.layers)  # noqa: B023
      hidden, _ = decoder.layer(
          config, context, hidden, weights, {}, window=windows[i])
    hidden = layers.rms_norm(
        hidden, base.norm, config.norm_eps, config.norm_offset)
    return decoder.unembed(config, base, None, hidden)

  assert tiny.distance(loop(base)[0], plain) <= 2e-6


def test_overrides_take_the_place_of_the_base(row):
  config = tiny.CONFIGS["qwen2"]
  base = init.random_base(jax.random.key(1), config)
  other = init.random_base(jax.random.key(5), config)
  positions = jnp.arange(row.shape[1])[None]
  ones = jnp.ones_like(row)
  empty = jax.tree.map(lambda _: None, base)
  expected = tiny.logits(config, other, row, positions, ones)
  adapters = adapters_lib.Adapters(overrides=other)
  whole = tiny.logits(config, empty, row, positions, ones, adapters)
  np.testing.assert_array_equal(whole, expected)
  partial = empty.replace(norm=other.norm)
  adapters = adapters_lib.Adapters(overrides=partial)
  one = tiny.logits(config, base, row, positions, ones, adapters)
  np.testing.assert_array_equal(
      one, tiny.logits(
          config, base.replace(norm=other.norm), row, positions, ones))


def test_rows_that_see_nothing_have_finite_gradients():
  q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 4, 2, 8))
  positions, none = jnp.arange(4)[None], jnp.zeros((1, 4), jnp.int32)

  def total(args):
    return attention.attention(
        *args, positions, positions, none, none).sum()

  grads = jax.grad(total)((q, k, v))
  assert all(bool(jnp.isfinite(g).all()) for g in grads)


def test_visible_by_hand():
  positions = jnp.asarray([[0, 1, 2, 0, 1, 0]])
  segments = jnp.asarray([[1, 1, 1, 2, 2, 0]])
  mask = attention.visible(positions, positions, segments, segments, 2)
  expected = np.array([
      [1, 0, 0, 0, 0, 0],
      [1, 1, 0, 0, 0, 0],
      [0, 1, 1, 0, 0, 0],
      [0, 0, 0, 1, 0, 0],
      [0, 0, 0, 1, 1, 0],
      [0, 0, 0, 0, 0, 0]], bool)
  np.testing.assert_array_equal(mask[0], expected)


def _lora(key, lead, i, o, rate):
  full = lambda x: jnp.full(lead, x)
  a, b = jax.random.normal(key, (2, *lead, 64, 2))
  return lora.LoRA(
      a=a[..., :i, :], b=jnp.swapaxes(b, -1, -2)[..., :o], scale=full(0.3),
      rate=full(rate), rank=full(2))


def test_noise_follows_the_example_not_the_row(row):
  """Dropout is the same packed or alone, and differs by layer and target."""
  config = tiny.CONFIGS["llama"]
  base = init.random_base(jax.random.key(1), config)
  d, l = config.d_model, (config.n_layers,)
  shapes = {"q_proj": (d, 32), "down_proj": (config.d_ff, d)}
  adapters = adapters_lib.Adapters(layers={
      name: _lora(jax.random.key(i), l, *shape, rate=0.5)
      for i, (name, shape) in enumerate(shapes.items())})

  @jax.jit
  def run(adapters, tokens, positions, segments, ids, seed):
    noise = adapters_lib.Noise(jax.random.key(seed), ids, positions)
    return decoder.forward(config, base, adapters, tokens, positions,
                           segments, noise=noise)[0]

  n = 8
  first, ones = row[:, :n], jnp.ones((1, n), jnp.int32)
  at = jnp.arange(n)[None]
  alone = run(adapters, first, at, ones, ones * 5, 0)
  packed = run(
      adapters, *(jnp.concatenate(pair, axis=1) for pair in (
          (row[:, n:2 * n], first), (at, at), (ones, ones * 2),
          (ones * 4, ones * 5))), 0)
  assert tiny.distance(packed[:, n:], alone) <= 2e-6
  for other in (run(adapters, first, at, ones, ones * 6, 0),
                run(adapters, first, at, ones, ones * 5, 1)):
    assert tiny.distance(other, alone) > 1e-2

  # The same factors in two layers, and in two targets, drop differently.
  noise = adapters_lib.Noise(jax.random.key(0), ones, at)
  x = jnp.ones((1, n, d))
  masks = [noise.at_layer(i).for_target(name).dropout(x, jnp.asarray(0.5))
           for i in range(2) for name in shapes]
  for i, mask in enumerate(masks):
    assert all(bool((mask != other).any()) for other in masks[:i])


def test_adapters_everywhere_equal_their_merge(row):
  for family in ("mistral", "qwen2"):  # Its own head, and a tied one.
    config = tiny.CONFIGS[family]
    base = init.random_base(jax.random.key(1), config)
    d, l, v = config.d_model, (config.n_layers,), config.vocab_size
    layer = _lora(jax.random.key(3), l, d, config.d_ff, rate=0.0)
    outer = {"embed_tokens": _lora(jax.random.key(4), (), v, d, rate=0.0)}
    if not config.tie_embeddings:
      outer["lm_head"] = _lora(jax.random.key(5), (), d, v, rate=0.0)
    adapters = adapters_lib.Adapters(
        layers={"up_proj": layer}, outer=outer)
    positions, ones = jnp.arange(row.shape[1])[None], jnp.ones_like(row)
    adapted = tiny.logits(config, base, row, positions, ones, adapters)

    layers_ = dict(base.layers)
    merged = jax.vmap(lambda a, w: a.merge(w))(
        layer, layers_["up_proj"].weight)
    layers_["up_proj"] = decoder.Linear(weight=merged)
    embedding = outer["embed_tokens"].merge(base.embed_tokens)
    head = (decoder.Linear(weight=base.embed_tokens.T)
            if config.tie_embeddings else decoder.Linear(
                weight=outer["lm_head"].merge(base.lm_head.weight)))
    whole = dataclasses.replace(
        base, layers=layers_, embed_tokens=embedding, lm_head=head)
    untied = dataclasses.replace(config, tie_embeddings=False)
    expected = tiny.logits(untied, whole, row, positions, ones)
    assert tiny.distance(adapted, expected) <= 2e-6
    plain = tiny.logits(config, base, row, positions, ones)
    assert tiny.distance(plain, expected) > 1e-2
