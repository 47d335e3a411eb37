"""New rows of embedding and head."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import errors
from lora_jax import quant
from lora_jax.models import init
from lora_jax.models import resize
from tests import tiny


def _base(tied, dtype=jnp.float32):
  config = dataclasses.replace(tiny.CONFIGS["llama"], tie_embeddings=tied)
  return config, init.random_base(jax.random.key(0), config, dtype)


@pytest.mark.parametrize("tokens, multiple, size", [
    (63, 1, 63), (63, 16, 64), (61, 16, 64), (65, 16, 80), (10, 1, 61)])
@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_are_the_mean(tokens, multiple, size, tied):
  config, base = _base(tied)
  grown_config, grown = resize.grow(config, base, tokens, multiple)
  assert grown_config.vocab_size == size
  table = np.asarray(base.embed_tokens, np.float64)
  np.testing.assert_array_equal(grown.embed_tokens[:61], base.embed_tokens)
  np.testing.assert_allclose(
      grown.embed_tokens[61:], table.mean(0)[None].repeat(size - 61, 0),
      atol=1e-6)
  if tied:
    assert grown.lm_head is None
    return
  head = np.asarray(base.lm_head.weight, np.float64)
  np.testing.assert_array_equal(
      grown.lm_head.weight[:, :61], base.lm_head.weight)
  np.testing.assert_allclose(
      grown.lm_head.weight[:, 61:],
      head.mean(1)[:, None].repeat(size - 61, 1), atol=1e-6)


def test_the_logits_of_old_tokens_stay():
  config, base = _base(False)
  tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
  positions = np.broadcast_to(np.arange(6, dtype=np.int32), (2, 6))
  before = tiny.logits(config, base, tokens, positions, np.ones_like(tokens))
  after = tiny.logits(*resize.grow(config, base, 64), tokens, positions,
                      np.ones_like(tokens))
  assert tiny.distance(after[..., :61], before) < 1e-6
  # A new token's logit is the mean logit: it is no surprise.
  np.testing.assert_allclose(after[..., 63], before.mean(-1), atol=1e-5)


def test_the_mean_is_taken_in_float32():
  config, base = _base(True, jnp.bfloat16)
  _, grown = resize.grow(config, base, 62)
  assert grown.embed_tokens.dtype == jnp.bfloat16
  np.testing.assert_array_equal(
      grown.embed_tokens[61],
      np.asarray(base.embed_tokens, np.float32).mean(0).astype(jnp.bfloat16))


def test_transformers_means_the_same(tmp_path):
  torch = pytest.importorskip("torch")

  config, base = _base(False)
  model = tiny.to_torch(config, base, tmp_path)
  torch.manual_seed(0)
  model.resize_token_embeddings(63, pad_to_multiple_of=16)
  _, grown = resize.grow(config, base, 63, 16)
  theirs = [m.weight.detach().numpy() for m in (
      model.get_input_embeddings(), model.get_output_embeddings())]
  # Theirs are drawn around the mean, with a covariance of 1e-9 times that of
  # the rows: 5 standard deviations.
  assert np.abs(grown.embed_tokens - theirs[0]).max() < 5 * 3.2e-5 * 1.5
  assert np.abs(grown.lm_head.weight.T - theirs[1]).max() < 5 * 3.2e-5 * 1.5


def test_refusals():
  config, base = _base(False)
  with pytest.raises(errors.UsageError, match="pad_vocab_multiple=0"):
    resize.grow(config, base, 61, 0)
  spec = quant.QuantSpec(block_size=8)
  base = base.replace(lm_head=base.lm_head.replace(
      weight=quant.quantize(base.lm_head.weight, spec)))
  with pytest.raises(errors.UsageError, match=r"add lm_head to quant\.skip"):
    resize.grow(config, base, 62)
