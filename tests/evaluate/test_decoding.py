"""What a token costs: no copy of the cache, no compilation, nothing twice."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import quant
from lora_jax import trees
from lora_jax.evaluate import decoding
from lora_jax.evaluate import generate as generate_lib
from lora_jax.evaluate import sampling as sampling_lib
from lora_jax.models import cache as cache_lib
from lora_jax.models import decoder
from lora_jax.models import init
from lora_jax.train import compiles
from tests import tiny
from tests.kernels import topologies

CONFIG = dataclasses.replace(tiny.CONFIGS["llama"], max_position=256)


@pytest.fixture(scope="module")
def model():
  """(config, base in NF4 with nested scales, DoRA that matters)."""
  base = init.random_base(jax.random.key(1), CONFIG)
  layers = {
      name: x.replace(weight=quant.quantize(
          x.weight, quant.QuantSpec("nf4", 8)))
      if isinstance(x, decoder.Linear) else x
      for name, x in base.layers.items()}
  base = base.replace(layers=layers)
  block = adapters_lib.AdapterConfig(method="dora", rank=2, alpha=4.0)
  return CONFIG, base, tiny.random_adapters(CONFIG, base, block)


def test_nothing_compiles_inside_a_bucket(model):
  def run(lengths, new, **how):
    prompts = [[i % 60 + 1] * n for i, n in enumerate(lengths)]
    return generate_lib.generate(*model, prompts, max_new_tokens=new, **how)

  run([5, 2, 9], 40)
  with compiles.CompileClock() as clock:
    run([32, 1, 17, 30], 3)
    run([3, 3, 3, 3], 90, temperature=0.7, top_k=3, top_p=0.5, seed=9)
    run([1, 31, 8], 11, stop_ids=[3])
    run([1, 31, 8], 70, stop_ids=range(20, 28), on_token=lambda *_: None)
    run([4, 4, 4], 33, rows=[7, 1, 3])
  assert clock.count == 0
  with compiles.CompileClock() as clock:
    run([33, 1, 17], 3)  # Another bucket, so that the clock is seen to go.
  assert clock.count > 0


def test_a_cache_that_grows_holds_the_same(model, monkeypatch):
  prompts = [[3, 1, 4, 1, 5], [9, 2]]

  def run(**how):
    return generate_lib.generate(*model, prompts, max_new_tokens=160, **how)

  sizes = []
  grown = decoding.grown
  monkeypatch.setattr(decoding, "grown", lambda state, size: (
      sizes.append((state.cache.k.shape[3], size)), grown(state, size))[1])
  free = run()
  assert sizes == [(128, 256)]
  monkeypatch.setattr(generate_lib, "SLOTS", 256)
  assert run() == free
  assert sizes == [(128, 256)]
  assert [len(row) for row in free] == [160, 160]
  # A row that stops in a later chunk, beside one that goes on.
  stop = free[0][100]
  assert run(stop_ids=[stop]) == [
      row[:row.index(stop)] if stop in row else row for row in free]


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("place", ["cpu", "h100"])
def test_a_token_does_not_copy_the_cache(place, heads):
  """A copy of all keys or all values would not fit."""
  if place == "cpu":
    # In bfloat16 XLA on CPU widens what it scatters into.
    device, dtype = jax.devices()[0], "float32"
  else:
    if reason := topologies.missing(place):
      pytest.skip(reason)
    device, dtype = topologies.devices(place)[0], "bfloat16"
  config = dataclasses.replace(CONFIG, n_layers=4, n_kv_heads=heads)
  here = jax.sharding.SingleDeviceSharding(device)
  b, s = 4, 4096

  def arguments():
    rows = jnp.zeros(b, jnp.int32)
    state = decoding.State(
        cache_lib.init_cache(config, b, s, dtype), rows, rows > 0, rows)
    request = decoding.Request(
        jax.random.key(0), rows, rows, sampling_lib.sampling())
    base = init.random_base(jax.random.key(0), config, dtype)
    return base, None, state, request, jnp.int32(3)

  args = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
      jax.eval_shape(arguments))
  compiled = decoding.decode.lower(
      *args, model=config, dtype=dtype).compile(
          compiler_options={"xla_gpu_autotune_level": 0}
          if place == "h100" else None)
  memory = compiled.memory_analysis()
  cache = args[2].cache
  stack = trees.nbytes(cache.k)
  # All of the state is written where it is.
  assert memory.alias_size_in_bytes >= 2 * stack
  assert memory.temp_size_in_bytes < stack


def test_preparing_changes_no_value_and_only_once(model):
  config, base, adapters = model
  tokens = jax.random.randint(jax.random.key(2), (1, 9), 0, config.vocab_size)
  at, ones = jnp.arange(9)[None], jnp.ones_like(tokens)
  before = tiny.logits(config, base, tokens, at, ones, adapters)
  once = decoding.prepared(base, adapters, "float32")
  after = tiny.logits(config, once[0], tokens, at, ones, once[1])
  assert tiny.distance(after, before) < 2e-6
  for name, layer in base.layers.items():
    if not isinstance(layer, decoder.Linear):
      continue
    ours = once[0].layers[name].weight
    assert ours.codes is layer.weight.codes
    for i in range(config.n_layers):
      nested = jax.tree.map(lambda x: x[i], layer.weight.scales)  # noqa: B023
      np.testing.assert_array_equal(ours.scales[i], nested.dequantize())
  twice = decoding.prepared(*once, "float32")
  assert all(a is b for a, b in zip(
      *map(jax.tree.leaves, (once[0], twice[0])), strict=True))
  for a, b in zip(*map(jax.tree.leaves, (once[1], twice[1])), strict=True):
    np.testing.assert_array_equal(a, b)


def test_preparing_rounds_as_every_product_would(model):
  config, base, adapters = model
  narrow, tree = decoding.prepared(base, adapters, "bfloat16")
  assert tree.layers["q_proj"].a.dtype == jnp.bfloat16
  assert narrow.embed_tokens.dtype == jnp.bfloat16
  assert narrow.norm.dtype == jnp.float32
  prompts = [[3, 1, 4]]
  run = lambda *model: generate_lib.generate(
      *model, prompts, max_new_tokens=20, dtype="bfloat16")
  assert run(config, narrow, tree) == run(config, base, adapters)
