"""Prefix tuning against PEFT and against itself, packed, cached, folded."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax.adapters import partition
from lora_jax.adapters import prefix
from lora_jax.adapters import registry
from lora_jax.data import packing
from lora_jax.data import templates
from lora_jax.evaluate import generate
from lora_jax.export import peft as peft_export
from lora_jax.models import decoder
from lora_jax.models import modules
from tests import tiny
from tests.adapters import contract
from tests.adapters import with_peft

N = 3
PROJECTED = {"tokens": N, "projection": True, "hidden": 10}


def build(options, config=contract.CONFIG, base=None, **fields):
  """Adapters with every trained leaf random."""
  block = adapters_lib.AdapterConfig(
      method="prefix", options=options, **fields)
  base = contract.quantised("none") if base is None else base
  _, tree = adapters_lib.build(
      jax.random.key(3), block, base, modules.paths(config),
      geometry=modules.geometry(config))
  return block, contract.moved(tree, 0.3)


def folded(tree):
  """With the prefixes themselves in place of their encoder."""
  stack = jax.vmap(lambda a: a.folded(tree.shared))(tree.layers["self_attn"])
  return adapters_lib.Adapters(layers={"self_attn": stack})


def logits(tree, tokens, positions, segments):
  return np.asarray(tiny.logits(
      contract.CONFIG, contract.quantised("none"), tokens, positions, segments,
      tree))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_it_is_peft_s_with_grouped_keys_and_windows(family, tmp_path):
  pytest.importorskip("torch")
  peft = pytest.importorskip("peft")
  config, base, model, adapters = with_peft.prompted(
      family, peft.PrefixTuningConfig(
          task_type="CAUSAL_LM", num_virtual_tokens=N), tmp_path)
  # Longer than the windows: the last tokens do not see all of the prefix.
  tokens = np.random.default_rng(0).integers(0, 61, (2, 9)).astype(np.int32)
  ours = tiny.logits(
      config, base, tokens, np.tile(np.arange(9, dtype=np.int32), (2, 1)),
      np.ones((2, 9), np.int32), adapters)
  there = tiny.torch_logits(model.eval(), tokens)
  assert tiny.distance(ours, there) <= 2e-5
  without = tiny.logits(
      config, base, tokens, np.tile(np.arange(9, dtype=np.int32), (2, 1)),
      np.ones((2, 9), np.int32))
  assert tiny.distance(without, there) > 1e-2


def test_the_encoder_is_peft_s():
  torch = pytest.importorskip("torch")
  peft = pytest.importorskip("peft")
  g = contract.GEOMETRY
  encoder = peft.PrefixEncoder(peft.PrefixTuningConfig(
      num_virtual_tokens=N, token_dim=g.k * g.e, num_layers=g.l,
      num_attention_heads=g.k, encoder_hidden_size=10,
      prefix_projection=True))
  state = {k: v.numpy() for k, v in encoder.state_dict().items()}
  one = prefix.Encoder(
      embedding=state["embedding.weight"], w=state["transform.0.weight"].T,
      b=state["transform.0.bias"])
  w = state["transform.2.weight"].T.reshape(10, g.l, 2, g.k, g.e)
  b = state["transform.2.bias"].reshape(g.l, 2, g.k, g.e)
  tree = adapters_lib.Adapters(
      layers={"self_attn": prefix.Projected(
          w=w.transpose(1, 2, 0, 3, 4), b=b, rank=np.ones(g.l, np.int32))},
      shared=one)
  ours = prefix.METHOD.form.tensors(tree)["prompt_embeddings"]
  there = encoder(torch.arange(N)).detach().numpy()
  np.testing.assert_allclose(ours, there, atol=1e-6)
  size = adapters_lib.trainable_size(tree)
  assert size == sum(p.numel() for p in encoder.parameters())
  # And a fresh one of ours has as many, by the formula as well.
  block, fresh = build(PROJECTED)
  assert adapters_lib.trainable_size(fresh) == size
  options = registry.checked(block).options
  count = registry.shared_count(prefix.METHOD, options, 1, g, g.l) + g.l * (
      registry.count(prefix.METHOD, options, "self_attn", (), 1, g))
  assert count == size


def test_it_is_trained_through_its_encoder_and_saved_without(tmp_path):
  block, tree = build(PROJECTED)
  data, base = contract.batch(), contract.quantised("none")

  def loss(trainable, frozen, fold):
    tree = adapters_lib.join(trainable, frozen)
    hidden, _ = decoder.forward(
        contract.CONFIG, base, folded(tree) if fold else tree, data.tokens,
        data.positions, data.segment_ids)
    return (hidden ** 2).sum() / 100

  both = adapters_lib.split(tree)
  within, outside = (
      jax.jit(jax.grad(loss), static_argnums=2)(*both, fold)
      for fold in (False, True))
  for ours, there in zip(jax.tree.leaves(within), jax.tree.leaves(outside),
                         strict=True):
    assert tiny.distance(ours, there) < 1e-4
  paths = modules.paths(contract.CONFIG)
  peft_export.write(
      tmp_path / "a", tree, peft_export.peft_config(block := registry.checked(
          block), tree, paths), paths)
  loaded = peft_export.read(
      tmp_path / "a", paths, modules.shapes(contract.CONFIG),
      geometry=contract.GEOMETRY)
  assert loaded.peft_config["prefix_projection"]
  assert loaded.peft_config["encoder_hidden_size"] == 10
  assert loaded.config.options == prefix.Options(tokens=N)
  assert jax.tree.structure(loaded.adapters) == jax.tree.structure(
      folded(tree))
  where = (data.tokens, data.positions, data.segment_ids)
  assert tiny.distance(
      logits(loaded.adapters, *where), logits(tree, *where)) < 1e-5


def test_every_segment_sees_the_prefix_and_no_other_segment():
  _, tree = build({"tokens": N})
  data = contract.batch()
  where = data.tokens, data.positions, data.segment_ids
  found = logits(tree, *where)
  # Each example alone, at the same positions.
  for part in (slice(0, 7), slice(7, 12)):
    alone = [np.zeros_like(x) for x in where]
    for there, x in zip(alone, where):
      there[:, :part.stop - part.start] = x[:, part]
    assert tiny.distance(
        logits(tree, *alone)[:, :part.stop - part.start],
        found[:, part]) < 1e-5
  # Nothing of the first example reaches the second.
  other = data.tokens.copy()
  other[:, :7] = (other[:, :7] + 1) % 31
  changed = logits(tree, other, *where[1:])
  np.testing.assert_array_equal(changed[:, 7:], found[:, 7:])
  assert np.abs(changed[:, :7] - found[:, :7]).max() > 1e-2
  # The prefix reaches both.
  layers = tree.layers["self_attn"]
  moved = adapters_lib.Adapters(layers={"self_attn": layers.replace(
      values=layers.values + 0.5)})
  changed = np.abs(logits(moved, *where) - found).max(-1)
  assert changed.min() > 1e-3


@pytest.mark.parametrize("options", [{"tokens": N}, PROJECTED])
def test_generation_from_a_cache_is_that_without_one(options):
  _, tree = build(options)
  prompts = [[3, 7, 1], [5, 2, 8, 9, 4]]
  found = generate.generate(
      contract.CONFIG, contract.quantised("none"), tree, prompts,
      max_new_tokens=4)
  for prompt, given in zip(prompts, found, strict=True):
    row = prompt + given
    batch = packing.fill([[0]], [templates.Encoded(
        np.asarray(row, np.int32), np.ones(len(row), np.float32))], 12)
    where = (np.tile(x, (2, 1)) for x in (
        batch.tokens, batch.positions, batch.segment_ids))
    greedy = logits(tree, *where)[0].argmax(-1)
    assert given == greedy[len(prompt) - 1:len(row) - 1].tolist()


def test_decoding_is_given_the_prefix_itself():
  _, tree = build(PROJECTED)
  ready = adapters_lib.prepared(tree, contract.quantised("none"))
  assert isinstance(ready.layers["self_attn"], prefix.Prefix)
  np.testing.assert_allclose(
      ready.layers["self_attn"].keys, folded(tree).layers["self_attn"].keys,
      atol=1e-6)


def test_published_counts():
  g = adapters_lib.Geometry(d=576, f=1536, h=9, k=3, e=64, l=30, v=49152)
  count = registry.count(
      prefix.METHOD, prefix.Options(), "self_attn", (), 1, g)
  assert g.l * count == 230_400
  assert registry.shared_count(
      prefix.METHOD, prefix.Options(), 1, g, g.l) == 0
  assert registry.METHODS["p_tuning_v2"].options().tokens == 128


def test_it_starts_as_peft_s_starts():
  def fresh(options):
    _, tree = adapters_lib.build(
        jax.random.key(0), adapters_lib.AdapterConfig(
            method="prefix", options=options),
        contract.quantised("none"), modules.paths(contract.CONFIG),
        geometry=contract.GEOMETRY)
    return folded(tree).layers["self_attn"]

  one = fresh({"tokens": 50})
  assert abs(np.std(one.keys) - 1) < 0.05 and abs(np.mean(one.values)) < 0.05
  assert not np.any(fresh({"tokens": N, "zero": True}).keys)
  assert not np.any(fresh(PROJECTED | {"zero": True}).values)
  # Linear layers of 16 and 10 inputs: var(b1) = 1/(3 * 16), tanh about linear.
  wide = fresh(PROJECTED | {"tokens": 200, "hidden": 100})
  assert 0.2 < np.std(wide.keys) < 0.6


def test_what_cannot_be_is_refused(tmp_path):
  for options, text in (
      ({"tokens": 0}, "adapter.options.tokens=0"),
      ({"hidden": -1}, "adapter.options.hidden=-1"),
      ({"projection": 3}, "no bool")):
    with pytest.raises(errors.UsageError, match=text):
      build(options)
  # PEFT has no way to say that a layer has none.
  block, tree = build({"tokens": N}, layers="0,2")
  paths = modules.paths(contract.CONFIG)
  config = peft_export.peft_config(registry.checked(block), tree, paths)
  with pytest.raises(errors.UserError, match="in every layer"):
    peft_export.write(tmp_path / "a", tree, config, paths)
  assert partition.trainable_size(tree) == 2 * 2 * N * 2 * 8
