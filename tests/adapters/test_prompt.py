"""Prompts of all kinds against PEFT's modules, and by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax.adapters import multitask_prompt
from lora_jax.adapters import p_tuning
from lora_jax.adapters import prompt
from lora_jax.adapters import registry
from lora_jax.data import formats
from lora_jax.data import packing
from lora_jax.data import templates
from lora_jax.data import virtual
from lora_jax.evaluate import generate
from lora_jax.models import modules
from tests import tiny
from tests.adapters import contract
from tests.adapters import with_peft

N, D = 3, 32
G = contract.GEOMETRY


def slot(options):
  return adapters_lib.base.Slot(
      rank=np.int32(1), scale=np.float32(1), rate=np.float32(0),
      target="prompt", options=options, geometry=G)


def fresh(method, **options):
  """The adapter of a method's options before the first step."""
  row = registry.METHODS[method]
  config = registry.checked(
      adapters_lib.AdapterConfig(method=method, options=options))
  table = jnp.arange(31.0)[:, None] * jnp.ones(D, jnp.bfloat16)
  return row.init(jax.random.key(0), table, slot(config.options))


def tree_of(adapter):
  return adapters_lib.Adapters(outer={"prompt": adapter})


def count(method, **options):
  row = registry.METHODS[method]
  options = registry.checked(adapters_lib.AdapterConfig(
      method=method, options=options)).options
  return registry.count(row, options, "prompt", (), 1, G)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_where_embeddings_are_scaled_it_is_peft_s(family, tmp_path):
  pytest.importorskip("torch")
  peft = pytest.importorskip("peft")
  config, base, model, adapters = with_peft.prompted(
      family, peft.PromptTuningConfig(
          task_type="CAUSAL_LM", num_virtual_tokens=N), tmp_path)
  tokens = np.random.default_rng(0).integers(0, 61, (2, 6)).astype(np.int32)
  ahead = np.concatenate([np.tile(virtual.ids(N), (2, 1)), tokens], 1)
  ours = tiny.logits(
      config, base, ahead, np.tile(np.arange(9, dtype=np.int32), (2, 1)),
      np.ones((2, 9), np.int32), adapters)
  there = tiny.torch_logits(model.eval(), tokens)
  assert tiny.distance(ours, there) <= 2e-5


def test_it_starts_at_words_or_at_random():
  drawn = fresh("prompt", tokens=400)
  assert abs(np.std(drawn.p) - 1) < 0.02 and drawn.p.dtype == jnp.float32
  # Row i of the table is i throughout.
  words = np.asarray(fresh("prompt", tokens=400, start="vocabulary").p)
  assert np.all(words == words[:, :1])
  assert set(words[:, 0]) == set(range(31))
  text = fresh("prompt", tokens=5, start="text", ids=(4, 30), text="a b")
  assert np.asarray(text.p)[:, 0].tolist() == [4, 30, 4, 30, 4]
  cut = fresh("prompt", tokens=1, start="text", ids="4+30")
  assert np.asarray(cut.p)[:, 0].tolist() == [4]
  # Where the model scales its embeddings, they are scaled.
  one = slot(prompt.Options(tokens=2, start="text", ids=(4, 30)))
  scaled = one.replace(geometry=adapters_lib.Geometry(
      d=D, f=48, h=4, k=2, e=8, l=3, v=31, embed_scale=8.0))
  table = jnp.arange(31.0)[:, None] * jnp.ones(D)
  assert np.asarray(prompt.start(jax.random.key(0), table, scaled))[
      :, 0].tolist() == [32, 240]


@pytest.mark.parametrize("options,text", [
    ({"tokens": 0}, "adapter.options.tokens=0"),
    ({"start": "words"}, "adapter.options.start"),
    ({"start": "text"}, "give those of the text"),
    ({"start": "text", "ids": (31,)}, "vocabulary of 31"),
    ({"start": "text", "ids": ("x",)}, "not all token ids")])
def test_a_prompt_that_cannot_start_is_refused(options, text):
  with pytest.raises(errors.UsageError, match=text):
    fresh("prompt", **options)


def test_a_text_is_named_in_the_file_with_what_made_ids_of_it():
  def config(**options):
    block = registry.checked(adapters_lib.AdapterConfig(
        method="prompt", options=options))
    return prompt.METHOD.form.config(block)

  found = config(start="text", text="a b", ids=(1, 2), tokenizer="some/base")
  assert found["prompt_tuning_init"] == "TEXT"
  assert found["tokenizer_name_or_path"] == "some/base"
  back = prompt.METHOD.form.block(found)["options"]
  assert back == {"tokens": 20, "start": "text", "text": "a b",
                  "tokenizer": "some/base"}
  # PEFT refuses to read a text without a tokenizer.
  assert config(start="text", ids=(1, 2))["prompt_tuning_init"] == "RANDOM"
  assert config(start="vocabulary")["prompt_tuning_init"] == "SAMPLE_VOCAB"


@pytest.mark.parametrize("options", [
    {"encoder": "mlp", "hidden": 12}, {"encoder": "mlp"},
    {"encoder": "lstm", "hidden": 6, "layers": 1},
    {"encoder": "lstm", "hidden": 5, "layers": 3}])
def test_the_encoder_is_peft_s(options):
  torch = pytest.importorskip("torch")
  peft = pytest.importorskip("peft")
  torch.manual_seed(0)
  there = peft.PromptEncoder(peft.PromptEncoderConfig(
      num_virtual_tokens=N, token_dim=D, num_transformer_submodules=1,
      encoder_reparameterization_type=options["encoder"].upper(),
      encoder_hidden_size=options.get("hidden", D),
      encoder_num_layers=options.get("layers", 2)))
  state = {k: jnp.asarray(v.numpy()) for k, v in there.state_dict().items()}
  one = fresh("p_tuning", tokens=N, **options)
  layers = [i for i in (0, 2, 4) if f"mlp_head.{i}.weight" in state]
  values = {"z": state["embedding.weight"]}
  for number, i in enumerate(layers, 1):
    values[f"w{number}"] = state[f"mlp_head.{i}.weight"].T
    values[f"b{number}"] = state[f"mlp_head.{i}.bias"]

  def both(name, layer):
    return jnp.stack([
        state[f"lstm_head.{name}_l{layer}{way}"].T for way in ("", "_reverse")])

  if options["encoder"] == "lstm":
    depth = range(options["layers"])
    values |= {
        "first": both("weight_ih", 0),
        "deeper": jnp.stack([both("weight_ih", i) for i in depth[1:]])
                  if len(depth) > 1 else None,
        "again": jnp.stack([both("weight_hh", i) for i in depth]),
        "bias": jnp.stack([
            jnp.stack([both("bias_ih", i), both("bias_hh", i)], 1)
            for i in depth])}
  assert jax.tree.map(jnp.shape, one.replace(**values)) == jax.tree.map(
      jnp.shape, one)
  one = one.replace(**values)
  expected = there(torch.arange(N)).detach().numpy()
  np.testing.assert_allclose(jax.jit(lambda a: a.virtual())(one), expected,
                             atol=2e-6)
  size = sum(p.numel() for p in there.parameters())
  assert one.size() == count("p_tuning", tokens=N, **options) == size
  # What is decoded with and what is saved is the prompt.
  ready = one.prepared(None)
  assert isinstance(ready, prompt.Prompt)
  np.testing.assert_allclose(ready.p, expected, atol=2e-6)
  assert jax.tree.leaves(prompt.tensors_of(tree_of(one)))[0].shape == (N, D)


def test_the_encoder_starts_as_torch_s():
  one = fresh("p_tuning", encoder="lstm", hidden=25)
  assert float(jnp.abs(one.again).max()) <= 0.2
  assert abs(float(jnp.std(one.first)) * 3 ** 0.5 - 0.2) < 0.01
  assert abs(float(jnp.std(one.w1)) * 150 ** 0.5 - 1) < 0.05
  assert abs(float(jnp.std(fresh("p_tuning").w2)) * 96 ** 0.5 - 1) < 0.05


def test_p_tuning_options_are_checked():
  for options, text in (({"layers": 0}, "options.layers=0"),
                        ({"encoder": "gru"}, "options.encoder"),
                        ({"hidden": -3}, "options.hidden=-3")):
    with pytest.raises(errors.UsageError, match=text):
      fresh("p_tuning", **options)


def test_the_prompts_of_tasks_are_peft_s():
  torch = pytest.importorskip("torch")
  peft = pytest.importorskip("peft")
  torch.manual_seed(0)
  there = peft.tuners.MultitaskPromptEmbedding(
      peft.MultitaskPromptTuningConfig(
          num_virtual_tokens=N, token_dim=D, num_transformer_submodules=1,
          num_tasks=2, num_ranks=2), None)
  one = multitask_prompt.MultitaskPrompt(
      p=jnp.asarray(there.embedding.weight.detach().numpy()),
      columns=jnp.asarray(there.prefix_task_cols.detach().numpy()),
      rows=jnp.asarray(there.prefix_task_rows.detach().numpy()),
      rank=jnp.int32(1))
  for task in range(2):
    expected = there(torch.arange(N)[None], torch.tensor([task]))[0]
    ours = one.virtual()[-1 - virtual.ids(N, task)]
    np.testing.assert_allclose(ours, expected.detach().numpy(), atol=1e-7)
  size = sum(p.numel() for p in there.parameters())
  assert one.size() == size == count(
      "multitask_prompt", tokens=N, tasks=2, ranks=2)
  assert adapters_lib.virtual_tokens(tree_of(one)) == N
  assert adapters_lib.virtual_tasks(tree_of(one)) == 2
  start = fresh("multitask_prompt", tokens=50, tasks=20)
  assert abs(float(jnp.std(start.columns)) - 0.02) < 0.002
  with pytest.raises(errors.UsageError, match=r"options\.tasks=0"):
    fresh("multitask_prompt", tasks=0)


def test_an_example_s_task_says_which_tokens_stand_before_it():
  rows = [formats.convert(row, "auto", "f:1") for row in (
      {"prompt": "a", "completion": "b", "task_id": 1},
      {"prompt": "a", "completion": "b"},
      {"prompt": "a", "completion": "b", "task_id": "HumanEval/3"})]
  assert [row.task for row in rows] == [1, None, None]
  tokenizer = tiny.byte_tokenizer()
  encoded = [templates.encode(row, tokenizer) for row in rows]
  assert [row.task for row in encoded] == [1, None, None]
  ahead = virtual.ahead(encoded[:1], 3, tasks=2)
  assert ahead[0].tokens.tolist()[:3] == [-4, -5, -6]
  assert ahead[0].task == 1
  # With one task it means nothing.
  assert virtual.ahead(encoded, 3)[0].tokens.tolist()[:3] == [-1, -2, -3]
  with pytest.raises(errors.UserError, match="task_id=None is none of"):
    virtual.ahead(encoded, 3, tasks=2)
  with pytest.raises(errors.UserError, match="example 0: task_id=2 is none"):
    virtual.ahead([templates.Encoded(
        encoded[0].tokens, encoded[0].weights, task=2)], 3, tasks=2)


def test_tasks_in_one_row_do_not_mix():
  base = contract.quantised("none")
  _, tree = adapters_lib.build(
      jax.random.key(0), contract.block("multitask_prompt"), base,
      modules.paths(contract.CONFIG), geometry=G)
  tree = contract.moved(tree, 0.5)
  same = np.asarray([3, 7, 1, 9], np.int32)
  rows = virtual.ahead(
      [templates.Encoded(same, np.ones(4, np.float32), task=task)
       for task in (0, 1, 0)], N, tasks=2)
  batch = packing.fill([[0, 1], [2]], rows, 14)

  found = np.asarray(tiny.logits(
      contract.CONFIG, base, batch.tokens, batch.positions, batch.segment_ids,
      tree))
  assert tiny.distance(found[1, :7], found[0, :7]) < 1e-5
  assert tiny.distance(found[0, 7:], found[0, :7]) > 1e-2
  # A token that is drawn continues the task of its own row.
  given = generate.generate(
      contract.CONFIG, base, tree, [same.tolist()] * 2, tasks=[1, 0],
      max_new_tokens=2)
  assert [row[0] for row in given] == [
      found[0, 13].argmax(), found[1, 6].argmax()]
  with pytest.raises(errors.UsageError, match=r"tasks=\[2\]"):
    generate.generate(contract.CONFIG, base, tree, [[1]], tasks=[2],
                      max_new_tokens=1)


def test_published_counts():
  g = adapters_lib.Geometry(d=576, f=1536, h=9, k=3, e=64, l=30, v=49152)
  assert registry.count(
      prompt.METHOD, prompt.Options(), "prompt", (), 1, g) == 11_520
  # MPT: n d + (n + d) a task (its section 3.2).
  assert registry.count(
      multitask_prompt.METHOD, multitask_prompt.Options(tokens=100), "prompt",
      (), 1, g) == 100 * 576 + 100 + 576
  assert registry.count(
      p_tuning.METHOD, p_tuning.Options(), "prompt", (), 1, g) == (
          20 * 576 + 3 * 577 * 576)
