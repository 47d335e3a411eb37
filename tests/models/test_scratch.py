"""Fresh weights: how they are drawn, read, and of which architecture."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import errors
from lora_jax import quant
from lora_jax.models import decoder
from lora_jax.models import hf
from lora_jax.models import init
from lora_jax.models import load
from lora_jax.models import scratch
from tests.models import tiny

KEY = jax.random.key(5)
# d = 24 = 4 x 6, as in most models.
LLAMA = dataclasses.replace(tiny.CONFIGS["llama"], head_dim=6)


def spread(x) -> float:
  return float(np.asarray(x, np.float64).std())


def test_weights_are_drawn_as_said():
  config = dataclasses.replace(
      LLAMA, d_model=96, n_layers=8, head_dim=24, d_ff=160, vocab_size=700)
  base = init.fresh_base(KEY, config)
  for name, module in base.layers.items():
    if not isinstance(module, decoder.Linear):
      np.testing.assert_array_equal(module, np.ones((8, 96)))
      continue
    # 0.02 / sqrt(2 8) = 0.005 for what writes into the residual stream.
    wanted = 0.005 if name in ("o_proj", "down_proj") else 0.02
    assert abs(spread(module.weight) / wanted - 1) < 0.02, name
    assert abs(np.asarray(module.weight).mean()) < 0.02 * wanted
    if module.bias is not None:
      assert not np.asarray(module.bias).any()
    layers = np.asarray(module.weight).reshape(8, -1)
    assert len(np.unique(layers[:, 0])) == 8
  assert base.layers["gate_proj"].bias is not None
  assert abs(spread(base.embed_tokens) / 0.02 - 1) < 0.02
  assert abs(spread(base.lm_head.weight) / 0.02 - 1) < 0.02
  gate, up = (np.asarray(base.layers[n].weight) for n in ("gate_proj",
                                                         "up_proj"))
  assert (gate != up).any()


def test_norms_multiply_by_one_in_every_family():
  for config in tiny.CONFIGS.values():
    base = init.fresh_base(KEY, config, jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(base)} == {jnp.dtype("bfloat16")}
    assert jax.tree.structure(base) == jax.tree.structure(jax.eval_shape(
        lambda config=config: init.random_base(KEY, config)))
    wanted = 1 - config.norm_offset  # Gemma adds 1 itself.
    np.testing.assert_array_equal(base.norm, np.full(config.d_model, wanted))


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_a_source_is_read_like_a_checkpoint(family):
  config = tiny.CONFIGS[family]
  source = scratch.Scratch(config, 5)
  jax.tree.map(np.testing.assert_array_equal, load.convert(source).base,
               init.fresh_base(KEY, config))
  spec = quant.QuantSpec("nf4", 8)
  found = load.convert(source, spec, jnp.bfloat16).base.layers["o_proj"].weight
  assert type(found) is quant.FORMATS["nf4"]
  weight = init.fresh_base(KEY, config).layers["o_proj"].weight
  np.testing.assert_array_equal(
      quant.dequantize(found, jnp.float32)[1],
      quant.dequantize(quant.quantize(weight[1], spec), jnp.float32))
  # Methods that look at the weights again see these.
  read = load.originals(source)
  np.testing.assert_array_equal(read("o_proj", 1), weight[1])


def test_the_fingerprint_is_of_architecture_and_seed():
  def found(config, seed, *how):
    return load.convert(scratch.Scratch(config, seed), *how).fingerprint

  first = found(LLAMA, 5)
  assert found(LLAMA, 5, quant.QuantSpec("int4", 8)) == first
  assert len(first) == 64
  others = [found(LLAMA, 6), *(
      found(dataclasses.replace(LLAMA, **change), 5)
      for change in ({"d_ff": 48}, {"norm_eps": 1e-5}))]
  assert len({first, *others}) == 4


def test_fields_are_changed():
  new = scratch.changed(LLAMA, {
      "n_layers": "3", "d_model": "32", "n_kv_heads": 1, "norm_eps": "1e-5",
      "tie_embeddings": "True", "sliding_window": "none"})
  assert new == dataclasses.replace(
      LLAMA, n_layers=3, d_model=32, head_dim=8, n_kv_heads=1, norm_eps=1e-5,
      tie_embeddings=True)
  assert scratch.changed(LLAMA, {"head_dim": 10}).head_dim == 10
  # Not d / h before: it stays.
  apart = tiny.CONFIGS["qwen3"]
  assert scratch.changed(apart, {"d_model": 48}).head_dim == apart.head_dim
  for config in tiny.CONFIGS.values():
    assert scratch.changed(config, {}) == config


def test_what_follows_from_other_fields():
  gemma = scratch.changed(tiny.CONFIGS["gemma3_text"], {
      "n_layers": 7, "d_model": 36})
  assert gemma.window_layers == (True,) * 5 + (False, True)
  assert gemma.embed_scale == 6
  assert hf.names(gemma)["model.embed_tokens.weight"] == (tiny.VOCAB, 36)


@pytest.mark.parametrize("fields, parts", [
    ({"n_layer": 2}, ['model.scratch="n_layer" is unknown',
                      'did you mean "n_layers"?']),
    ({"rope": "x"}, ["rope cannot be changed", "d_model"]),
    ({"layer_order": "1"}, ["layer_order cannot be changed"]),
    ({"n_layers": "few"}, ["n_layers=few is no int", "has n_layers=2"]),
    ({"n_layers": 2.5}, ["n_layers=2.5 is no int"]),
    ({"tie_embeddings": "maybe"}, ["tie_embeddings=maybe is no bool"]),
    ({"norm_eps": "nan"}, ["norm_eps=nan is no float"]),
    ({"d_ff": 0}, ["d_ff=0 is out of range"]),
    ({"d_model": 30}, ["n_heads=4 (the checkpoint's) does not divide "
                       "d_model=30", "set n_heads as well"]),
    ({"n_heads": 5, "d_model": 24}, ["n_heads=5 does not divide d_model=24",
                                     "another n_heads"]),
    ({"n_heads": 3}, ["n_kv_heads=2 (the checkpoint's) does not divide "
                      "n_heads=3", "set n_kv_heads as well"]),
    ({"d_model": 20}, ["head_dim=5 is odd"]),
    ({"family": "lama"}, ['model_type="lama"', "llama"]),
    ({"activation": "relu"}, ['activation="relu" is unknown']),
    ({"qk_norm": True}, ["qk_norm=True, but llama models", "qk_norm=False"]),
    ({"norm_offset": 1}, ["norm_offset=1, but llama models", "leave it out"]),
])
def test_what_cannot_be(fields, parts):
  with pytest.raises(errors.UsageError) as info:
    scratch.changed(LLAMA, fields)
  message = str(info.value)
  assert message.startswith("model.scratch") and "\n" not in message
  for part in parts:
    assert part in message, message
