"""An MLP in tiles: the same values and gradients, in less memory."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax.models import decoder
from lora_jax.models import init
from lora_jax.models import tiles
from tests import tiny

B, T = 2, 14


def test_a_function_of_tokens_by_hand():
  """Every tile sees its own tokens, ids and positions, and no padding is
  left; the largest tile is as wide as it was asked for."""
  x = np.arange(B * T * 3, dtype=np.float32).reshape(B, T, 3)
  ids = np.arange(B * T, dtype=np.int32).reshape(B, T)
  noise = adapters_lib.Noise(jax.random.key(0), ids, 100 + ids)
  widths = []

  def function(keep, x, noise):
    del keep
    widths.append(x.shape[1])
    return x * 2 + (noise.example_ids * 1000 + noise.positions)[..., None]

  expected = 2 * x + (1000 * ids + 100 + ids)[..., None]
  for n, width in ((1, 14), (2, 7), (4, 4), (5, 3), (14, 1), (40, 1)):
    widths.clear()
    np.testing.assert_array_equal(
        tiles.over_tokens(function, x, noise, n), expected)
    assert set(widths) == {width}
  np.testing.assert_array_equal(
      tiles.over_tokens(lambda keep, x, noise: x + 1, x, None, 3), x + 1)


# It norms, and keeps, what comes out of the MLP.
FAMILY = "gemma2"


@functools.cache
def setup():
  """(config, base, trainable, frozen); dropout in the MLP's adapters."""
  config = tiny.CONFIGS[FAMILY]
  base = init.random_base(jax.random.key(0), config)
  tree = tiny.random_adapters(config, base, adapters_lib.AdapterConfig(
      rank=2, alpha=4.0, dropout=0.4, targets="mlp"))
  return config, base, *adapters_lib.split(tree)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def value_and_grads(config, remat, n, params, frozen, base):
  """Of a function of all hidden states, by adapters and input embeddings."""
  tokens = jax.random.randint(jax.random.key(1), (B, T), 0, config.vocab_size)
  at = jnp.tile(jnp.arange(T), (B, 1))
  noise = adapters_lib.Noise(jax.random.key(2), at // 5, at % 5)

  def total(trained):
    params, table = trained
    hidden, _ = decoder.forward(
        config, dataclasses.replace(base, embed_tokens=table),
        adapters_lib.join(params, frozen), tokens, at, jnp.ones_like(at),
        noise=noise, remat=remat, mlp_tiles=n)
    return (hidden ** 2 * jnp.arange(config.d_model)).sum(), hidden

  return jax.value_and_grad(total, has_aux=True)((params, base.embed_tokens))


@pytest.mark.parametrize("remat", ["named", "full"])
def test_gradients_are_those_of_the_whole(remat):
  config, base, params, frozen = setup()
  (_, hidden), grads = value_and_grads(
      config, "none", 1, params, frozen, base)
  (_, tiled), ours = value_and_grads(config, remat, 4, params, frozen, base)
  assert tiny.distance(tiled, hidden) <= 2e-6
  for got, want in zip(jax.tree.leaves(ours), jax.tree.leaves(grads)):
    assert float(jnp.abs(want).max()) > 0
    assert tiny.distance(got, want) <= 5e-6


def test_the_memory_of_a_step_falls():
  """By most of what the activations `[b, t, f]` took."""
  f, t = 512, 256
  config = dataclasses.replace(tiny.CONFIGS["llama"], d_ff=f)
  base = jax.eval_shape(
      lambda: init.random_base(jax.random.key(0), config))

  def temporary(n):
    def total(table, base, tokens, at):
      hidden, _ = decoder.forward(
          config, dataclasses.replace(base, embed_tokens=table), None,
          tokens, at, jnp.ones_like(at), remat="full", mlp_tiles=n)
      return (hidden ** 2).sum()

    tokens = jax.ShapeDtypeStruct((1, t), jnp.int32)
    compiled = jax.jit(jax.grad(total)).lower(
        base.embed_tokens, base, tokens, tokens).compile()
    return compiled.memory_analysis().temp_size_in_bytes, compiled.as_text()

  whole, text = temporary(1)
  tiled, tiled_text = temporary(8)
  assert f"f32[1,{t},{f}]" in text or f"f32[{t},{f}]" in text
  # Not even in pieces put side by side.
  for shape in (f"[1,{t},{f}]", f"[{t},{f}]", f"[8,1,{t // 8},{f}]"):
    assert f"f32{shape}" not in tiled_text
  assert whole - tiled >= 2 * t * f * 4
