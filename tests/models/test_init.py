"""Random bases."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import errors
from lora_jax import host as host_lib
from lora_jax import quant
from lora_jax.models import decoder
from lora_jax.models import init
from tests.models import tiny

KEY = jax.random.key(3)
SPEC, NONE = quant.QuantSpec("nf4", 16), quant.QuantSpec("none")
# Projections 24x24, 24x40 and 40x24: a block of 16 and a tail.
LLAMA = dataclasses.replace(
    tiny.CONFIGS["llama"], n_layers=3, n_kv_heads=4, head_dim=6)


def test_a_quantised_base_is_the_plain_one_quantised():
  plain = init.quantised_base(KEY, LLAMA, NONE)
  found = init.quantised_base(KEY, LLAMA, SPEC)
  for name, one in plain.layers.items():
    if isinstance(one, decoder.Linear):
      wanted = one.replace(weight=quant.quantize(one.weight, SPEC))
      jax.tree.map(
          np.testing.assert_array_equal, found.layers[name], wanted)
      assert type(found.layers[name].weight) is quant.FORMATS["nf4"]
    else:
      np.testing.assert_array_equal(found.layers[name], one)
  jax.tree.map(np.testing.assert_array_equal, found.lm_head, plain.lm_head)
  np.testing.assert_array_equal(found.embed_tokens, plain.embed_tokens)


def test_a_base_is_made_in_host_memory():
  found = init.quantised_base(KEY, LLAMA, SPEC, host=True)
  jax.tree.map(np.testing.assert_array_equal, found,
               init.quantised_base(KEY, LLAMA, SPEC))
  weight = found.layers["q_proj"].weight
  assert host_lib.in_host(weight.codes)
  assert not host_lib.in_host(found.lm_head.weight)
  assert not host_lib.in_host(found.layers["input_layernorm"])


def test_every_weight_is_drawn_as_said():
  base = init.quantised_base(KEY, LLAMA, NONE)
  shapes = jax.eval_shape(
      lambda: init.random_base(KEY, LLAMA, jnp.bfloat16))
  assert jax.tree.structure(base) == jax.tree.structure(shapes)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), base) == jax.tree.map(
      lambda x: (x.shape, x.dtype), shapes)
  down = np.asarray(base.layers["down_proj"].weight, np.float32)
  # N(0, 1/40), 3 x 40 x 24 values: 4 standard errors.
  assert abs(down.mean()) < 4 / (40 * down.size) ** 0.5
  assert abs(down.var() * 40 - 1) < 4 * (2 / down.size) ** 0.5
  weights = [np.asarray(base.layers[n].weight) for n in ("q_proj", "o_proj",
                                                         "k_proj", "v_proj")]
  flat = [tuple(layer.ravel()[:9]) for w in weights for layer in w]
  assert len(set(flat)) == len(flat)  # No two layers or projections alike.


def test_a_tied_head_gives_logits_of_variance_1():
  for tied, variance in ((False, 1.0), (True, 1 / 24)):
    config = dataclasses.replace(LLAMA, tie_embeddings=tied, vocab_size=2000)
    base = init.quantised_base(KEY, config, NONE)
    found = np.asarray(base.embed_tokens, np.float32)
    assert base.embed_tokens.dtype == jnp.bfloat16
    assert abs(found.var() / variance - 1) < 4 * (2 / found.size) ** 0.5
    assert (base.lm_head is None) == tied


def test_what_is_skipped_stays_as_it_is():
  base = init.quantised_base(KEY, LLAMA, SPEC, skip=("q_proj",))
  assert isinstance(base.layers["q_proj"].weight, jax.Array)
  assert isinstance(base.layers["k_proj"].weight, quant.QuantizedArray)
  assert isinstance(base.lm_head.weight, quant.QuantizedArray)
  with pytest.raises(errors.UsageError, match=r"quant\.format"):
    init.quantised_base(KEY, LLAMA, quant.QuantSpec("nf5"))
