"""Remat policies change what is kept, not what is computed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import quant
from lora_jax.adapters import lora
from lora_jax.models import decoder
from lora_jax.models import init
from lora_jax.models import remat
from tests.models import tiny

CONFIG = tiny.CONFIGS["llama"]
B, T = 3, 16


@pytest.fixture(scope="module")
def setup():
  """(loss by trained arrays and policy, trained arrays).

  Trained are the embeddings and an adapter on o_proj over a frozen base.
  """
  base = init.random_base(jax.random.key(0), CONFIG)
  spec = quant.QuantSpec(block_size=8)
  layers = {
      name: (x.replace(weight=quant.quantize(x.weight, spec))
             if isinstance(x, decoder.Linear) else x)
      for name, x in base.layers.items()}
  base = base.replace(layers=layers)
  tokens = jax.random.randint(jax.random.key(1), (B, T), 0, tiny.VOCAB)
  positions = jnp.broadcast_to(jnp.arange(T), (B, T))

  width = CONFIG.n_heads * CONFIG.head_dim
  low = jax.random.normal(jax.random.key(2), (2, width, 2)) / 4
  high = jax.random.normal(jax.random.key(3), (2, 2, CONFIG.d_model)) / 4

  def loss(trained, policy):
    embedding, low = trained
    adapters = adapters_lib.Adapters(
        layers={"o_proj": lora.LoRA(
            a=low, b=high, scale=jnp.ones(2), rate=jnp.zeros(2),
            rank=jnp.full(2, 2))},
        overrides=jax.tree.map(lambda _: None, base).replace(
            embed_tokens=embedding))
    frozen = base.replace(embed_tokens=None)
    hidden, _ = decoder.forward(
        CONFIG, frozen, adapters, tokens, positions,
        jnp.ones_like(tokens), remat=policy)
    return (hidden ** 2 * jnp.arange(CONFIG.d_model)).sum()

  return loss, (base.embed_tokens, low)


def test_same_gradients(setup):
  loss, trained = setup
  grad = jax.jit(jax.grad(loss), static_argnums=1)
  expected = grad(trained, "none")
  for policy in remat.POLICIES:
    for got, want in zip(grad(trained, policy), expected):
      assert tiny.distance(got, want) <= 2e-6, policy


def test_named_keeps_the_names_and_nothing_else(setup):
  loss, trained = setup

  def stacked(policy):
    """Elements a token that the backward pass keeps of every layer."""
    # Nothing is computed: it is the shapes that are asked for.
    pullback = jax.eval_shape(
        lambda x: jax.vjp(lambda x: loss(x, policy), x)[1], trained)
    leaves = jax.tree.leaves(pullback)
    return sum(
        np.prod(x.shape[1:]) / (B * T) for x in leaves
        # Of inputs there is one more than of layers; see `tape`.
        if x.ndim > 2 and x.shape[1] == B
        and x.shape[0] - CONFIG.n_layers in (0, 1)
        and jnp.issubdtype(x.dtype, jnp.floating))

  d, f, e = CONFIG.d_model, CONFIG.d_ff, CONFIG.head_dim
  heads, kv = CONFIG.n_heads * e, CONFIG.n_kv_heads * e
  named = 2 * heads + 2 * kv + d + 2 * f  # q, o; k, v; mid; gate, up.
  assert stacked("full") == d  # The layer's input.
  assert stacked("named") == d + named
  assert stacked("dots") > d
  assert stacked("none") > d + named
