"""The chunked loss against numpy and torch."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import types
from lora_jax.models import decoder
from lora_jax.models import init
from lora_jax.train import loss
from lora_jax.train import step
from tests import tiny

B, T, D, V = 2, 9, 6, 37


def _inputs():
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  hidden, head, bias = 3 * normal(B, T, D), normal(D, V), normal(V)
  targets = rng.integers(0, V, (B, T)).astype(np.int32)
  # Floats of all sizes, among them zeros.
  weights = np.where(rng.random((B, T)) < 0.3, 0, rng.random((B, T)) * 3)
  zeros = np.zeros((B, T), np.int32)
  batch = types.Batch(
      tokens=zeros, targets=targets, positions=zeros, segment_ids=zeros + 1,
      example_ids=zeros, loss_weights=weights.astype(np.float32))
  return hidden, head, bias, batch


def _reference(hidden, head, bias, batch):
  """Loss and gradients by torch, in float64."""
  torch = pytest.importorskip("torch")
  x, w, b = (torch.tensor(a, dtype=torch.float64, requires_grad=True)
             for a in (hidden, head, bias))
  nll = torch.nn.functional.cross_entropy(
      (x @ w + b).reshape(-1, V), torch.tensor(batch.targets).long().flatten(),
      reduction="none")
  value = (nll * torch.tensor(batch.loss_weights).flatten()).sum()
  value.backward()
  return value.item(), [a.grad.numpy() for a in (x, w, b)]


# Tokens a chunk: one chunk, some that divide 18 and some that do not.
@pytest.mark.parametrize("chunk", [1, 4, 6, 16, 64])
def test_against_torch(chunk, monkeypatch):
  hidden, head, bias, batch = _inputs()
  monkeypatch.setattr(loss, "chunk_size", lambda tokens, vocab, ways: chunk)

  def unembed(trainable, frozen, x, part):
    del part
    return x @ trainable["head"] + frozen["bias"]

  def value(x, w):
    return loss.weighted_nll(
        unembed, {"head": w}, {"bias": bias}, x, batch, V)

  got, grads = jax.value_and_grad(value, (0, 1))(hidden, head)
  expected, wanted = _reference(hidden, head, bias, batch)
  assert got == pytest.approx(expected, rel=1e-6)
  assert value(hidden, head) == pytest.approx(expected, rel=1e-6)
  for ours, theirs in zip(grads, wanted):
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert error < 2e-6


def test_token_nll_by_hand():
  logits = np.array([[1.0, 2.0, 3.0], [1000.0, 0.0, -1000.0]], np.float32)
  got = loss.token_nll(logits, np.array([0, 1]))
  first = np.log(np.exp(1) + np.exp(2) + np.exp(3)) - 1
  np.testing.assert_allclose(got, [first, 1000.0], rtol=1e-6)


@pytest.mark.parametrize("tokens, vocab, expected", [
    (512, 49152, 256), (8, 49152, 8), (10**6, 10**9, 16), (300, 61, 300),
    (0, 61, 1)])
def test_chunk_size(tokens, vocab, expected):
  size = loss.chunk_size(tokens, vocab)
  assert size == expected
  assert size * vocab <= loss.CHUNK_ELEMENTS or size <= 16


def _plain(params, frozen, base, batch, config):
  """The loss with all logits at once."""
  tree = adapters_lib.join(params, frozen)
  hidden, _ = decoder.forward(
      config, base, tree, batch.tokens, batch.positions, batch.segment_ids)
  logits = decoder.unembed(config, base, tree, hidden)
  return jnp.sum(loss.token_nll(logits, batch.targets) * batch.loss_weights)


# Untied, tied, and a head that is trained: as an adapter and in full.
CASES = {
    "untied": ("llama", "lora", "all-linear"),
    "tied": ("qwen2", "lora", "all-linear"),
    "tied, embeddings adapted": ("qwen2", "lora", "embed_tokens,q_proj"),
    "head adapted": ("llama", "dora", "lm_head,v_proj"),
    "untied, full": ("llama", "full", "all-linear"),
    "tied, full": ("qwen2", "full", "all-linear"),
}


@pytest.mark.parametrize("case", [
    # Two programs each; others have a head of this kind, too.
    pytest.param(x, marks=pytest.mark.slow)
    if x in ("untied", "tied, full") else x for x in CASES])
def test_of_a_model_is_the_plain_one(case, monkeypatch):
  family, method, targets = CASES[case]
  config = tiny.CONFIGS[family]
  base = init.random_base(jax.random.key(0), config)
  block = adapters_lib.AdapterConfig(
      method=method, rank=2, alpha=4.0, targets=targets)
  if method == "full":
    base, tree = adapters_lib.build(
        jax.random.key(1), block, base, tiny.paths(config))
  else:
    tree = tiny.random_adapters(config, base, block)
  params, frozen = adapters_lib.split(tree)
  rng = np.random.default_rng(0)
  shape = (2, 11)
  ids = lambda: rng.integers(0, config.vocab_size, shape).astype(np.int32)
  batch = types.Batch(
      tokens=ids(), targets=ids(),
      loss_weights=rng.random(shape).astype(np.float32),
      positions=np.broadcast_to(np.arange(11, dtype=np.int32), shape),
      segment_ids=np.ones(shape, np.int32),
      example_ids=np.zeros(shape, np.int32))
  monkeypatch.setattr(loss, "chunk_size", lambda tokens, vocab, ways: 4)
  ours = jax.jit(jax.value_and_grad(lambda p: step.weighted_sum(
      p, frozen, base, batch, jax.random.key(0), model=config,
      settings=step.Settings(remat="none"))))(params)
  plain = jax.jit(jax.value_and_grad(
      lambda p: _plain(p, frozen, base, batch, config)))(params)
  assert ours[0] == pytest.approx(float(plain[0]), rel=2e-6)
  for x, y in zip(jax.tree.leaves(ours[1]), jax.tree.leaves(plain[1])):
    assert jnp.abs(x - y).max() <= 2e-5 * jnp.abs(y).max()


def _shapes(jaxpr):
  """Shapes of all values in a jaxpr and those inside of it."""
  for eqn in jaxpr.eqns:
    for var in eqn.outvars:
      yield tuple(var.aval.shape)
    for value in eqn.params.values():
      for inner in jax.tree.leaves(
          value, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
        if hasattr(inner, "eqns"):
          yield from _shapes(inner)
        elif hasattr(inner, "jaxpr"):
          yield from _shapes(inner.jaxpr)


def test_logits_of_a_batch_never_exist(monkeypatch):
  config = dataclasses.replace(tiny.CONFIGS["llama"], vocab_size=997)
  base = init.random_base(jax.random.key(0), config)
  block = adapters_lib.AdapterConfig(rank=2, alpha=4.0)
  _, tree = adapters_lib.build(
      jax.random.key(1), block, base, tiny.paths(config))
  params, frozen = adapters_lib.split(tree)
  zeros = np.zeros((3, 2, 16), np.int32)
  batch = types.Batch(
      tokens=zeros, targets=zeros, loss_weights=zeros.astype(np.float32),
      positions=zeros, segment_ids=zeros + 1, example_ids=zeros)

  def most(chunk):
    """Most tokens in an array with the vocabulary's axis."""
    with monkeypatch.context() as patch:
      patch.setattr(loss, "chunk_size", lambda tokens, vocab, ways: chunk)
      # A function of its own: traces are cached by function.
      jaxpr = jax.make_jaxpr(lambda p: step.loss_and_grads(
          p, frozen, base, batch, jax.random.key(0), model=config,
          settings=step.Settings()))(params)
    return max(int(np.prod(s)) // 997 for s in _shapes(jaxpr.jaxpr)
               if 997 in s and config.d_model not in s)

  assert most(4) == 4
  assert most(32) == 32  # The whole micro-batch: the search does find it.
