"""ShadowPEFT: by hand, in packed and padded rows, cached, and PEFT's."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from lora_jax import adapters as adapters_lib
from lora_jax import api
from lora_jax import errors
from lora_jax import trees
from lora_jax import types as types_lib
from lora_jax.adapters import registry
from lora_jax.adapters import shadow
from lora_jax.data import dataset
from lora_jax.data import templates
from lora_jax.evaluate import generate
from lora_jax.export import hf as hf_export
from lora_jax.export import peft as peft_export
from lora_jax.models import beside
from lora_jax.models import cache as cache_lib
from lora_jax.models import decoder
from lora_jax.models import init
from lora_jax.models import modules
from lora_jax.train import loop
from lora_jax.train import optim
from lora_jax.train import step as step_lib
from tests import tiny
from tests.adapters import contract
from tests.adapters import with_peft

CONFIG = contract.CONFIG
B, T, D, U, R = 2, 3, 6, 5, 2


def draw(*shape, seed=0):
  return jnp.asarray(
      np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def model(**fields):
  """A base, and adapters of which everything matters."""
  _, tree = adapters_lib.build(
      jax.random.key(1), contract.block("shadow", **fields),
      contract.quantised("none"), tiny.paths(CONFIG),
      geometry=contract.GEOMETRY)
  return contract.quantised("none"), contract.moved(tree, 0.2)


def logits(base, tree, tokens, positions=None, segments=None):
  at = np.tile(np.arange(tokens.shape[1], dtype=np.int32), (len(tokens), 1))
  return np.asarray(tiny.logits(
      CONFIG, base, tokens, at if positions is None else positions,
      np.ones_like(at) if segments is None else segments, tree))


# --- by hand


def block(rank=R):
  shapes = {"down": (D, R), "up": (R, D)} | {
      f"{mlp}_{name}": shape for mlp in "tg" for name, shape in (
          ("in", (D, U)), ("in_bias", (U,)), ("out", (U, D)),
          ("out_bias", (D,)))}
  return shadow.ShadowLayer(
      **{name: draw(*shape, seed=n)
         for n, (name, shape) in enumerate(shapes.items())},
      scale=jnp.float32(0.3), rate=jnp.float32(0.5), rank=jnp.int32(rank))


def test_a_layer_by_hand():
  one, h, s, y = block(), *(draw(B, T, D, seed=n) for n in (20, 21, 22))
  w = {f.name: np.asarray(getattr(one, f.name), np.float64)
       for f in dataclasses.fields(one)}

  def gelu(x):
    return np.vectorize(lambda v: v * 0.5 * (1 + math.erf(v / 2 ** 0.5)))(x)

  entered, left = np.zeros((B, T, D)), np.zeros((B, T, D))
  for b in range(B):
    for t in range(T):
      x = np.asarray(h[b, t] - s[b, t], np.float64)
      entered[b, t] = h[b, t] + 0.3 * (x @ w["down"] @ w["up"])
      out = np.asarray(y[b, t], np.float64)
      new, gate = (
          gelu(out @ w[f"{n}_in"] + w[f"{n}_in_bias"]) @ w[f"{n}_out"]
          + w[f"{n}_out_bias"] for n in "tg")
      gate = 1 / (1 + np.exp(-gate))
      left[b, t] = (1 - gate) * s[b, t] + gate * new
  np.testing.assert_allclose(one.entered(h, s), entered, atol=2e-6)
  np.testing.assert_allclose(one.left(y, s), left, atol=2e-6)


def test_a_layer_that_is_not_adapted_passes_both_on():
  one, h, s = block(rank=0), draw(B, T, D, seed=1), draw(B, T, D, seed=2)
  np.testing.assert_array_equal(one.entered(h, s), h)
  np.testing.assert_array_equal(one.left(h, s), s)


def test_the_state_begins_with_a_model_of_its_own():
  """Whose embeddings are the base's, with what is trained of them."""
  base, tree = model(trainable_token_indices=(8, 9))
  data = contract.batch()
  small = dataclasses.replace(
      CONFIG, n_layers=2, d_model=32, d_ff=48, tie_embeddings=True)
  own = init.random_base(jax.random.key(5), small)
  own = dataclasses.replace(
      own, norm=tree.shared.norm, embed_tokens=tree.outer[
          "embed_tokens"].merge(base.embed_tokens),
      layers={name: decoder.Linear(
          weight=tree.shared.layers[name].weight,
          bias=tree.shared.layers[name].bias) if hasattr(one, "weight")
              else tree.shared.layers[name]
              for name, one in own.layers.items()})
  expected, _ = decoder.forward(
      small, own, None, data.tokens, data.positions, data.segment_ids)
  assert (data.tokens == 8).any()
  assert tiny.distance(contract.begun(base, tree, data), expected) < 2e-6


def test_dropout_is_of_the_difference():
  one, ones = block(), jnp.ones((B, T), jnp.int32)
  noise = adapters_lib.Noise(
      jax.random.key(0), ones, jnp.tile(jnp.arange(T), (B, 1)))
  h, s = draw(B, T, D, seed=1), draw(B, T, D, seed=2)
  apart = noise.dropout(h - s, one.rate)
  assert 0 < (apart == 0).sum() < apart.size
  np.testing.assert_allclose(
      one.entered(h, s, noise), h + 0.3 * (apart @ one.down @ one.up),
      atol=1e-5)


# --- rows and caches


def test_examples_of_a_row_do_not_see_each_other():
  base, tree = model()
  tokens = np.random.default_rng(1).integers(0, 31, (2, 9)).astype(np.int32)
  whole = logits(base, tree, tokens)
  positions = np.concatenate([np.arange(9), np.arange(5), np.zeros(4)])
  segments = np.repeat([1, 2, 0], [9, 5, 4])
  row = np.concatenate([tokens[0], tokens[1, :5], [7] * 4])
  found = logits(base, tree, row[None], positions.astype(np.int32)[None],
                 segments.astype(np.int32)[None])[0]
  assert tiny.distance(found[:9], whole[0]) < 2e-5
  assert tiny.distance(found[9:14], whole[1, :5]) < 2e-5


@jax.jit
def cached(base, tree, tokens, positions, segments, cache):
  hidden, cache = decoder.forward(
      CONFIG, base, tree, tokens, positions, segments, cache=cache)
  return decoder.unembed(CONFIG, base, tree, hidden), cache


def test_caches_of_both_give_what_whole_rows_do():
  """Rows of unequal length, by a prompt and then by token; one that stops;
  a cache that grows."""
  base, tree = model()
  tokens = np.random.default_rng(3).integers(0, 31, (3, 20)).astype(np.int32)
  lengths = np.asarray([7, 3, 5])
  at = np.tile(np.arange(7, dtype=np.int32), (3, 1))
  whole = logits(base, tree, tokens)
  cache = cache_lib.init_cache(
      CONFIG, 3, 10, reader=beside.model(CONFIG, tree))
  assert cache.first.k.shape[0] == 2 and cache.k.shape[0] == 3
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


def test_a_cache_of_the_model_alone_is_refused():
  base, tree = model()
  at = np.arange(4, dtype=np.int32)[None]
  with pytest.raises(ValueError, match=r"reader=beside\.model"):
    decoder.forward(CONFIG, base, tree, at, at, at * 0 + 1,
                    cache=cache_lib.init_cache(CONFIG, 1, 8))


def test_generation_is_what_whole_passes_give():
  base, tree = model()
  prompts = [[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5]]
  config = dataclasses.replace(CONFIG, max_position=64)
  found = generate.generate(config, base, tree, prompts, max_new_tokens=9)
  for row, new in zip(prompts, found, strict=True):
    whole = logits(base, tree, np.asarray([row + new], np.int32))
    assert np.argmax(whole[0, len(row) - 1:-1], -1).tolist() == new
  assert found != generate.generate(
      config, base, None, prompts, max_new_tokens=9)


# --- training


@functools.partial(jax.jit, static_argnames=("remat", "tiles", "noise"))
def gradient(tree, base, data, remat="none", tiles=1, noise=False):
  trainable, frozen = adapters_lib.split(tree)
  return step_lib.loss_and_grads(
      trainable, frozen, base, data, jax.random.key(0), model=CONFIG,
      settings=step_lib.Settings(remat=remat, mlp_tiles=tiles, noise=noise))


@pytest.mark.parametrize("how", [
    {"remat": "named"}, {"remat": "full"}, {"remat": "full", "tiles": 3}],
                         ids=str)
@pytest.mark.parametrize("noise", [False, True])
def test_gradients_do_not_depend_on_how_they_are_computed(how, noise):
  """On what is kept, tiles of tokens, the order of rows and micro-batches."""
  base, tree = model(dropout=0.3)
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


@pytest.mark.parametrize("remat", ["none", "named"])
def test_a_bf16_step_is_near_the_exact_one(remat):
  """Beside an NF4 base; there products of the same x are one."""
  base, tree = contract.randomised("shadow", "nf4")
  data = contract.stacked(contract.batch())
  exact, expected = gradient(tree, base, data)
  value, grads = jax.jit(functools.partial(
      step_lib.loss_and_grads, model=CONFIG, settings=step_lib.Settings(
          dtype="bfloat16", remat=remat)))(
              *adapters_lib.split(tree), base, data, jax.random.key(0))
  assert abs(value - exact) < 0.05
  expected = trees.paths(expected)
  for path, leaf in trees.paths(grads).items():
    assert leaf.dtype == jnp.float32, path
    assert tiny.distance(leaf, expected[path]) < 0.2, path


def test_layers_in_several_runs_compute_the_same():
  """Those before the first that is adapted have a scan of their own."""
  base, tree = model(layers="2")
  assert len(adapters_lib.spans(tree.layers, 3)) == 2
  stack, = (one for one, *_ in adapters_lib.stacks(tree.layers["layer"]))
  whole = jax.tree.map(
      lambda x: jnp.concatenate([jnp.zeros((2, *x.shape[1:]), x.dtype), x]),
      stack)
  one = dataclasses.replace(tree, layers={"layer": whole})
  data = contract.batch()
  np.testing.assert_allclose(
      contract.logits(base, tree), contract.logits(base, one), atol=1e-5)
  value, grads = gradient(tree, base, contract.stacked(data))
  other, others = gradient(one, base, contract.stacked(data))
  np.testing.assert_allclose(value, other, rtol=1e-6)
  for path, leaf in trees.paths(grads.shared).items():
    assert tiny.distance(leaf, trees.paths(others.shared)[path]) < 2e-5, path


def test_loss_and_gradients_are_pefts(tmp_path):
  """With the loss of the shadow itself, which is most of this one."""
  peft = pytest.importorskip("peft")
  torch = pytest.importorskip("torch")
  config = block_of(auxiliary=0.7)
  tree = with_peft.build(config)
  with_peft.write(tmp_path / "a", config, tree)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    theirs = peft.PeftModel.from_pretrained(
        with_peft.torch_model(), str(tmp_path / "a"), is_trainable=True).eval()
  tokens = with_peft.TOKENS
  labels = torch.from_numpy(tokens.astype(np.int64))
  loss = theirs(labels, labels=labels).loss
  loss.backward()

  b, t = 2, tokens.shape[1] - 1
  data = types_lib.Batch(
      tokens=tokens[:, :-1], targets=tokens[:, 1:],
      loss_weights=np.ones((b, t), np.float32),
      positions=np.arange(t, dtype=np.int32)[None].repeat(b, 0),
      segment_ids=np.ones((b, t), np.int32),
      example_ids=np.arange(b, dtype=np.int32)[:, None].repeat(t, 1))
  frozen = adapters_lib.split(tree)[1]
  run = functools.partial(
      jax.jit(step_lib.loss_and_grads, static_argnames=("model", "settings")),
      model=with_peft.CONFIG, settings=step_lib.Settings())

  def step(tree):
    return run(*adapters_lib.split(tree), with_peft.base(),
               contract.stacked(data), jax.random.key(0))

  value, grads = step(tree)
  assert abs(value - loss.item()) / loss.item() <= 2e-6
  without, _ = step(dataclasses.replace(
      tree, shared=dataclasses.replace(tree.shared, auxiliary=0.0)))
  assert value - without > 1
  ours = peft_export.tensors(
      adapters_lib.join(grads, frozen), with_peft.PATHS)
  seen = 0
  for name, value in theirs.named_parameters():
    if value.requires_grad:
      own = ours.pop(name)
      if value.grad is None:  # T and G of the last layer.
        assert "layers.2.shadow_update" in name and not own.any()
        continue
      assert tiny.distance(own, value.grad.numpy()) < 2e-5, name
      seen += 1
  assert not ours and seen == 3 * 10 - 8 + 16 + 1


def test_a_run_is_saved_and_read(tmp_path):
  """Trained with dropout, packed, at LoRA+'s rates; generated from."""
  whole = api.Model(
      config=dataclasses.replace(CONFIG, max_position=64),
      base=contract.quantised("none"),
      tokenizer=types.SimpleNamespace(chat_template=None, eos_token_id=0),
      fingerprint="0" * 64, source="tiny")
  rows = dataset.of([templates.Encoded(
      tokens=np.arange(n, dtype=np.int32), weights=np.ones(n, np.float32))
                     for n in (9, 5, 7)])
  model = whole.adapt(
      method="shadow", rank=4, dropout=0.1, options={"strength": 0.5})
  before = model.evaluate(rows).loss
  model, _ = model.train(
      rows, workdir=tmp_path / "w", max_length=16,
      config=loop.TrainConfig(steps=8, batch_size=2),
      optim=optim.OptimConfig(learning_rate=0.02, lora_plus_ratio=2.0))
  assert model.evaluate(rows).loss < before - 0.02
  model.save(tmp_path / "a")
  back = whole.with_adapter(tmp_path / "a")
  assert back.evaluate(rows).loss == model.evaluate(rows).loss
  assert back.generate([[1, 2, 3]], max_new_tokens=4) == model.generate(
      [[1, 2, 3]], max_new_tokens=4)


# --- PEFT


def block_of(where=None, **options):
  return registry.checked(adapters_lib.AdapterConfig(
      method="shadow", rank=4, layers=where,
      options={"strength": 0.5} | options))


@pytest.mark.parametrize("where, options", [
    (None, {"layers": 1}), (None, {"layers": 4, "update": 7}),
    ("1-2", {}), ("0", {"layers": 2})])
def test_peft_computes_the_same(where, options, tmp_path):
  loaded, _ = with_peft.check(block_of(where, **options), tmp_path)
  assert loaded.config.options.layers == options.get("layers", 1)
  assert loaded.config.options.strength == 0.5


def theirs(torch_model, folder, **config):
  """PEFT's logits with everything of it random, and its folder."""
  peft = pytest.importorskip("peft")
  torch = pytest.importorskip("torch")
  torch.manual_seed(0)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    found = peft.get_peft_model(torch_model, peft.ShadowConfig(
        task_type="CAUSAL_LM", r=4, shadow_alpha=0.5, **config)).eval()
  with torch.no_grad():
    for value in found.parameters():
      if value.requires_grad:
        value += 0.1 * torch.randn_like(value)
  found.save_pretrained(str(folder))
  return tiny.torch_logits(found, with_peft.TOKENS)


@pytest.mark.parametrize("name", sorted(tiny.CONFIGS))
def test_shadows_of_every_family(name, tmp_path):
  """Windows, norms, biases, RoPE's extensions, fused modules, scaled
  embeddings: all are the small decoder's, too, of more layers than the
  model's. What was read is written again byte for byte."""
  config = tiny.CONFIGS[name]
  base = init.random_base(jax.random.key(1), config)
  expected = theirs(tiny.to_torch(config, base, tmp_path / "m"), tmp_path / "a",
                    shadow_num_hidden_layers=3)
  loaded = peft_export.read(
      tmp_path / "a", modules.paths(config), modules.shapes(config),
      geometry=modules.geometry(config))
  at = np.tile(np.arange(12, dtype=np.int32), (2, 1))
  found, plain = (tiny.logits(
      config, base, with_peft.TOKENS, at, np.ones_like(at), tree)
                  for tree in (loaded.adapters, None))
  assert tiny.distance(found, expected) < 2e-5
  assert tiny.distance(plain, expected) > 1e-3
  peft_export.write(
      tmp_path / "b", loaded.adapters, loaded.peft_config,
      modules.paths(config))
  first, second = (with_peft.tensors(tmp_path / n) for n in "ab")
  assert {k: v.tobytes() for k, v in first.items()} == {
      k: v.tobytes() for k, v in second.items()}
  # A new one has the same tensors, of the same shapes.
  _, tree = adapters_lib.build(
      jax.random.key(1), block_of(layers=3), base, modules.paths(config),
      geometry=modules.geometry(config))
  new = peft_export.tensors(tree, modules.paths(config))
  assert {k: v.shape for k, v in new.items()} == {
      k: v.shape for k, v in first.items()}


@pytest.mark.parametrize("fields, shape", [
    ({"shadow_hidden_size": 16, "shadow_num_attention_heads": 2}, (31, 16)),
    ({"shadow_hidden_size": 24, "shadow_intermediate_size": 20}, (31, 24)),
    ({"shadow_intermediate_size": 20}, None),
    ({"share_embeddings": False}, (31, 32)),
])
def test_shadows_of_other_widths_are_read(fields, shape, tmp_path):
  expected = theirs(with_peft.torch_model(), tmp_path / "a", **fields)
  loaded = with_peft.read(tmp_path / "a")
  assert tiny.distance(with_peft.logits(loaded.adapters), expected) < 2e-5
  assert tiny.distance(with_peft.logits(None), expected) > 1e-3
  table = loaded.adapters.shared.embed_tokens
  assert (table is None) == (shape is None)
  assert shape is None or table.shape == shape
  peft_export.write(
      tmp_path / "b", loaded.adapters, loaded.peft_config, with_peft.PATHS)
  first, second = (with_peft.tensors(tmp_path / n) for n in "ab")
  assert {k: v.tobytes() for k, v in first.items()} == {
      k: v.tobytes() for k, v in second.items()}


# --- what cannot be


def test_it_is_no_weight():
  base, tree = model()
  with pytest.raises(errors.UserError, match="ShadowLayer stands beside"):
    hf_export.merged(CONFIG, base, tree)


@pytest.mark.parametrize("first", ["lora", "shadow"])
def test_it_stands_alone(first):
  pair = [contract.block(name, **({} if name == "shadow" else {
      "targets": "q_proj", "rank_pattern": {}}))
          for name in sorted(("lora", "shadow"), key=lambda n: n != first)]
  with pytest.raises(errors.UserError, match="shadow has a decoder of its own"):
    adapters_lib.build(
        jax.random.key(0), pair, contract.quantised("none"),
        tiny.paths(CONFIG), geometry=contract.GEOMETRY)


@pytest.mark.parametrize("options, message", [
    ({"layers": 0}, "adapter.options.layers=0 is out of range"),
    ({"update": -1}, "adapter.options.update=-1 is out of range"),
    ({"auxiliary": -0.5}, "adapter.options.auxiliary=-0.5 is out of range"),
])
def test_options_that_cannot_be(options, message):
  with pytest.raises(errors.UsageError, match=message):
    registry.checked(contract.block("shadow", options=options))


def test_a_new_shadow_has_the_models_heads():
  with pytest.raises(errors.UsageError, match="heads=2: a new shadow has"):
    model(options={"heads": 2})


def test_peft_knows_no_gaps(tmp_path):
  """A layer between others is given hidden states and the state as one."""
  _, tree = model(layers="0,2")
  with pytest.raises(errors.UserError, match="leaves layers between others"):
    with_peft.write(tmp_path / "a", contract.block("shadow"), tree)
  with pytest.raises(AttributeError, match="'ShadowCarrier' object has no"):
    theirs(with_peft.torch_model(), tmp_path / "b",
           target_modules=["model.layers.0", "model.layers.2"])


def test_peft_leaves_out_the_cap_of_the_shadows_logits(tmp_path):
  """In the shadow's own loss of Gemma 2, whose logits have one."""
  peft = pytest.importorskip("peft")
  torch = pytest.importorskip("torch")
  config = tiny.CONFIGS["gemma2"]
  base = init.random_base(jax.random.key(1), config)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    found = peft.get_peft_model(
        tiny.to_torch(config, base, tmp_path / "m"), peft.ShadowConfig(
            task_type="CAUSAL_LM", auxiliary_loss_weight=1.0)).eval()
  found.save_pretrained(str(tmp_path / "a"))
  labels = torch.from_numpy(with_peft.TOKENS.astype(np.int64))
  with torch.no_grad():
    out = found(labels, labels=labels)
  tree = peft_export.read(
      tmp_path / "a", modules.paths(config), modules.shapes(config),
      geometry=modules.geometry(config)).adapters
  at = np.tile(np.arange(12, dtype=np.int32), (2, 1))
  state, _ = beside.begun(
      decoder.forward, config, base, tree, with_peft.TOKENS, at,
      np.ones_like(at))

  def loss(config):
    logits = decoder.unembed(config, base, None, state)[:, :-1]
    picked = np.take_along_axis(
        jax.nn.log_softmax(logits), with_peft.TOKENS[:, 1:, None], -1)
    return -float(picked.mean())

  shown = float(out.shadow_loss)
  plain = loss(dataclasses.replace(config, final_softcap=None))
  assert abs(plain - shown) < 1e-5 * shown
  assert abs(loss(config) - shown) > 0.1


def test_a_folder_that_cannot_be(tmp_path):
  tree = with_peft.build(block_of("0-1"))
  with_peft.write(tmp_path / "a", block_of("0-1"), tree)
  place = tmp_path / "a" / peft_export.CONFIG
  config = json.loads(place.read_text())
  assert config["target_modules"] == ["model.layers.0", "model.layers.1"]

  def read(**fields):
    place.write_text(json.dumps(config | fields))
    return with_peft.read(tmp_path / "a")

  with pytest.raises(errors.UserError, match="is a network of its own kind"):
    read(shadow_model="some/model")
  with pytest.raises(errors.UserError, match=r"layers\.1\..* is missing"):
    read(shadow_num_hidden_layers=2)
  with pytest.raises(errors.UserError, match=r"gate.*has shape \(4,\), this"):
    read(update_hidden_size=5)
  read()
  tensors = with_peft.tensors(tmp_path / "a")
  name = f"base_model.{shadow.BACKBONE}.layers.0.mlp.up_proj.weight"

  def changed(changes):
    safetensors.numpy.save_file(
        tensors | changes, tmp_path / "a" / peft_export.WEIGHTS)
    return with_peft.read(tmp_path / "a")

  with pytest.raises(errors.UserError, match=r"up_proj.*has shape \(48, 31\)"):
    changed({name: tensors[name][:, 1:]})
  with pytest.raises(errors.UserError, match=r"head.*is no part of a shadow"):
    changed({"base_model.shadow_head.default.weight": tensors[name]})
  changed({})
