"""LLaMA-Adapter against its equation in numpy, and against PEFT's form."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax.adapters import llama_adapter
from lora_jax.adapters import registry
from lora_jax.adapters import runs
from lora_jax.adapters import targets
from lora_jax.evaluate import generate
from lora_jax.export import peft as peft_export
from lora_jax.models import init
from lora_jax.models import modules
from tests import tiny
from tests.adapters import contract


def build(method, **fields):
  block = contract.block(method, **fields)
  _, tree = adapters_lib.build(
      jax.random.key(3), block, contract.quantised("none"),
      modules.paths(contract.CONFIG), geometry=contract.GEOMETRY)
  return registry.checked(block), contract.moved(tree, 0.3)


@pytest.mark.parametrize("cls", [
    llama_adapter.LlamaAdapter, llama_adapter.AdaptionPrompt])
def test_it_is_the_paper_s_equation(cls):
  """Four query heads on two of keys, and a scale that is not e^-1/2."""
  rng = np.random.default_rng(0)
  b, t, h, k, e, n, d = 2, 3, 4, 2, 5, 3, 7
  q, o = rng.standard_normal((2, b, t, h, e))
  prompt = rng.standard_normal((n, d))
  weights = {name: rng.standard_normal((d, k * e))
             for name in ("k_proj", "v_proj")}
  gate = np.asarray([0.5, -2.0, 0.1, 3.0])[:h if cls is
                                          llama_adapter.LlamaAdapter else 1]
  one = cls(prompt=jnp.asarray(prompt, jnp.float32),
            gate=jnp.asarray(gate, jnp.float32), rank=jnp.int32(1))
  found = one.attended(
      jnp.asarray(q, jnp.float32), jnp.asarray(o, jnp.float32),
      lambda x, name: x @ weights[name].astype(np.float32), 0.3)

  expected = o.copy()
  for head in range(h):
    part = slice((head // 2) * e, (head // 2 + 1) * e)
    keys, values = (prompt @ weights[x][:, part] for x in weights)
    scores = np.exp(0.3 * q[:, :, head] @ keys.T)
    found_values = scores / scores.sum(-1, keepdims=True) @ values
    by = np.tanh(gate[head]) if gate.size > 1 else gate[0]
    expected[:, :, head] += by * found_values
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_peft_adds_a_bias_of_o_proj_twice(tmp_path):
  """Where there is none, they agree; with one, by the bias in each layer."""
  torch = pytest.importorskip("torch")
  peft = pytest.importorskip("peft")
  config = tiny.CONFIGS["llama"]
  # PEFT takes d / h for e.
  config = type(config)(**{**vars(config), "d_model": 32, "o_bias": True,
                           "qkv_bias": True, "n_layers": 2})
  base = init.random_base(jax.random.key(1), config)
  tokens = np.random.default_rng(0).integers(0, 61, (1, 6)).astype(np.int32)
  where = np.arange(6, dtype=np.int32)[None], np.ones((1, 6), np.int32)

  def both(bias):
    o_proj = base.layers["o_proj"]
    own = base.replace(layers=base.layers | {
        "o_proj": o_proj.replace(bias=bias * jnp.ones_like(o_proj.bias))})
    model = tiny.to_torch(config, own, tmp_path / f"base{bias}")
    torch.manual_seed(0)
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      model = peft.get_peft_model(model, peft.AdaptionPromptConfig(
          task_type="CAUSAL_LM", adapter_len=3, adapter_layers=1))
    fresh = tiny.torch_logits(model.eval(), tokens)
    plain = tiny.logits(config, own, tokens, *where)
    with torch.no_grad():
      for name, value in model.named_parameters():
        if "adaption_gate" in name:
          value.fill_(0.7)
    model.save_pretrained(tmp_path / f"a{bias}")
    loaded = peft_export.read(
        tmp_path / f"a{bias}", modules.paths(config), modules.shapes(config),
        geometry=modules.geometry(config))
    assert loaded.config.method == "adaption_prompt"
    assert loaded.config.targets == ("model.layers.1.self_attn",)
    ours = tiny.logits(config, own, tokens, *where, loaded.adapters)
    assert tiny.distance(ours, plain) > 1e-2
    return (tiny.distance(ours, tiny.torch_logits(model, tokens)),
            tiny.distance(plain, fresh))

  with_gate, at_start = both(0.0)
  assert with_gate < 2e-5 and at_start < 2e-5
  with_gate, at_start = both(0.5)
  # A gate of zero should leave the model alone, and in PEFT does not.
  assert with_gate > 1e-2 and at_start > 1e-2


def test_only_the_last_layers_have_a_form_of_peft_s(tmp_path):
  block, tree = build("adaption_prompt", layers="last 2")
  paths = modules.paths(contract.CONFIG)
  ranks = runs.values(tree.layers["self_attn"], "rank")
  assert ranks.tolist() == [0, 1, 1]
  config = peft_export.peft_config(block, tree, paths)
  assert config["adapter_layers"] == 2 and config["adapter_len"] == 3
  peft_export.write(tmp_path / "a", tree, config, paths)
  loaded = peft_export.read(
      tmp_path / "a", paths, modules.shapes(contract.CONFIG),
      geometry=contract.GEOMETRY)
  again = runs.values(loaded.adapters.layers["self_attn"], "rank")
  assert again.tolist() == [0, 1, 1]
  assert adapters_lib.trainable_size(loaded.adapters) == 2 * (3 * 32 + 1)
  block, tree = build("adaption_prompt", layers="0,2")
  with pytest.raises(errors.UserError, match=r'adapter\.layers="last 2"'):
    peft_export.peft_config(block, tree, paths)
  with pytest.raises(errors.UsageError, match="of the 3 layers"):
    build("adaption_prompt", layers="last 4")
  assert targets.select(
      {"q_proj": [f"layers.{i}.q_proj" for i in range(5)]}, "q_proj",
      "0, last 2") == {"q_proj": [True, False, False, True, True]}


def test_cached_generation_and_bfloat16():
  _, tree = build("llama_adapter")
  base, prompts = contract.quantised("none"), [[3, 7, 1], [5, 2, 8, 9, 4]]
  found = generate.generate(
      contract.CONFIG, base, tree, prompts, max_new_tokens=4)
  for prompt, given in zip(prompts, found, strict=True):
    row = np.zeros((2, 12), np.int32)
    row[:, :len(prompt) + 4] = prompt + given
    greedy = tiny.logits(
        contract.CONFIG, base, row, np.tile(
            np.arange(12, dtype=np.int32), (2, 1)),
        (np.arange(12) < len(prompt) + 4).astype(np.int32)[None] * np.ones(
            (2, 1), np.int32), tree)[0].argmax(-1)
    assert given == greedy[len(prompt) - 1:len(prompt) + 3].tolist()
  one = contract.one(tree.layers["self_attn"], 0)
  q = jax.random.normal(jax.random.key(0), (2, 3, 4, 8), jnp.bfloat16)
  w = jax.random.normal(jax.random.key(1), (32, 16), jnp.bfloat16)

  def project(x, name):
    del name
    return x @ w.astype(x.dtype)

  small = one.attended(q, q, project, 0.35)
  exact = one.attended(*[q.astype(jnp.float32)] * 2, project, 0.35)
  assert small.dtype == jnp.bfloat16
  assert tiny.distance(small.astype(jnp.float32), exact) < 2e-2


def test_projections_that_drop_of_their_input_keep_all_of_a_prompt():
  """LoRA's dropout is drawn for examples, and a prompt belongs to none."""
  base, tree = adapters_lib.build(
      jax.random.key(3), {
          "prompts": contract.block("llama_adapter"),
          "lora": contract.block(
              "lora", targets="k_proj", dropout=0.5, rank_pattern={})},
      contract.quantised("none"), modules.paths(contract.CONFIG),
      geometry=contract.GEOMETRY)
  value, grads = contract.gradient(
      *adapters_lib.split(contract.moved(tree)), base,
      contract.stacked(contract.batch()), jax.random.key(0), noise=True)
  assert np.isfinite(value)
  for leaf in jax.tree.leaves(grads):
    assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0


def test_published_count():
  """1.2M parameters: the last 30 layers of LLaMA-7B, 10 tokens in each."""
  g = adapters_lib.Geometry(d=4096, f=11008, h=32, k=32, e=128, l=32, v=32000)
  a_layer = registry.count(
      llama_adapter.METHOD, llama_adapter.Options(), "self_attn", (), 1, g)
  assert 30 * a_layer == 1_229_760
