"""Generation against transformers, and against itself in other batches."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax.evaluate import decoding
from lora_jax.evaluate import generate as generate_lib
from lora_jax.evaluate import sampling as sampling_lib
from lora_jax.models import init
from tests import tiny

PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3], [2]]
NEW = 12


@pytest.fixture(scope="module")
def model():
  """(config, base, adapters): qk-norm, a window, GQA, a LoRA that matters."""
  config = dataclasses.replace(tiny.CONFIGS["qwen3"], max_position=64)
  base = init.random_base(jax.random.key(1), config)
  block = adapters_lib.AdapterConfig(rank=3, alpha=6.0)
  return config, base, tiny.random_adapters(config, base, block)


@pytest.fixture(scope="module")
def run(model):
  def call(prompts=PROMPTS, max_new_tokens=NEW, **kwargs):
    return generate_lib.generate(
        *model, prompts, max_new_tokens=max_new_tokens, **kwargs)
  return call


def _oracle(config, base, tmp_path):
  """The model in transformers."""
  pytest.importorskip("torch")
  return tiny.to_torch(config, base, tmp_path)


def test_greedy_equals_transformers(model, tmp_path):
  config, base, _ = model
  torch = pytest.importorskip("torch")
  reference = _oracle(config, base, tmp_path)
  ours = generate_lib.generate(
      config, base, None, PROMPTS, max_new_tokens=NEW)
  for prompt, row in zip(PROMPTS, ours, strict=True):
    theirs = reference.generate(
        torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False,
        eos_token_id=None, pad_token_id=0)[0, len(prompt):]
    assert row == theirs.tolist()


def test_cached_equals_whole_passes(model, run):
  config, base, adapters = model
  t = 32

  @jax.jit
  def next_token(tokens, length):
    positions = jnp.arange(t)[None]
    logits = tiny.logits(
        config, base, tokens, positions,
        (positions < length).astype(jnp.int32), adapters)
    return jnp.argmax(logits[0, length - 1])

  row = list(PROMPTS[1])
  for _ in range(NEW):
    padded = np.zeros((1, t), np.int32)
    padded[0, :len(row)] = row
    row.append(int(next_token(padded, len(row))))
  assert run()[1] == row[len(PROMPTS[1]):]


@pytest.mark.parametrize("how", [
    {}, {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "seed": 5}])
def test_rows_do_not_depend_on_the_batch(run, how):
  together = run(**how)
  for i, prompt in enumerate(PROMPTS):
    assert run([prompt], rows=[i], **how) == [together[i]]


def test_seed_and_row_decide_the_sample(run):
  how = dict(temperature=1.0)
  first = run([PROMPTS[0]] * 2, **how)
  assert first[0] != first[1]
  assert first == run([PROMPTS[0]] * 2, **how)
  assert first != run([PROMPTS[0]] * 2, seed=1, **how)
  assert run() != run(temperature=1.0)
  # One token left is greedy at any temperature, in both ways.
  assert run(temperature=3.0, top_k=1) == run()
  assert run(temperature=3.0, top_p=1e-6) == run()


def test_adapter_is_used(model, run):
  config, base, _ = model
  plain = generate_lib.generate(
      config, base, None, PROMPTS, max_new_tokens=NEW)
  assert plain != run()


def test_stop_tokens_end_their_row_only(run):
  free = run()
  stop = free[0][3]
  expected = [row[:row.index(stop)] if stop in row else row for row in free]
  assert expected[0] != free[0] and any(
      a == b for a, b in zip(expected, free))
  assert run(stop_ids=[stop]) == expected


def test_stop_at_once(run):
  first = run()[0][0]
  assert run([PROMPTS[0]], stop_ids=[first]) == [[]]


def test_streaming_gives_the_result(run):
  seen = [[] for _ in PROMPTS]
  order = []

  def on_token(row, token):
    seen[row].append(token)
    order.append(row)

  assert run(on_token=on_token) == seen
  assert order[:3] == [0, 1, 2]  # As they appear, not row after row.


def test_context_ends_a_row(model, run):
  config, *_ = model
  prompt = [1] * (config.max_position - 3)
  assert [len(r) for r in run([prompt, [2]], max_new_tokens=5)] == [3, 5]


def test_no_recompilation(run):
  def sizes():
    return (decoding.prefill._cache_size(), decoding.decode._cache_size())

  run()
  before = sizes()
  run([[1, 2], [3] * 20, [4], [5, 6, 7]], max_new_tokens=7)
  run(temperature=0.7, top_k=3, top_p=0.5, seed=9, stop_ids=[1])
  assert sizes() == before


def test_bfloat16_runs(run):
  assert [len(r) for r in run(dtype=jnp.bfloat16)] == [NEW] * 3


@pytest.mark.parametrize("prompts, kwargs, message", [
    ([[1], []], {}, "prompt 1 has no token"),
    ([[1] * 64], {}, "prompt 0 has 64 tokens.*max_position.*64"),
    ([[1, 61]], {}, "prompt 0 holds token 61.*0 to 60"),
    ([[1, -1]], {}, "prompt 0 holds token -1"),
    ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0"),
    ([[1]], {"temperature": -0.5}, "temperature=-0.5"),
    ([[1]], {"temperature": float("nan")}, "temperature=nan"),
    ([[1]], {"top_k": -1}, "top_k=-1"),
    ([[1]], {"top_p": 0.0}, "top_p=0.0"),
    ([[1]], {"top_p": 1.5}, "top_p=1.5"),
])
def test_bad_input(run, prompts, kwargs, message):
  with pytest.raises(errors.UserError, match=message) as caught:
    run(prompts, **kwargs)
  assert "\n" not in str(caught.value)


def test_no_prompts(run):
  assert run([]) == []


@pytest.mark.parametrize("temperature, top_k, top_p", [
    (1.0, 0, 1.0), (0.6, 5, 1.0), (1.7, 0, 0.8), (0.9, 12, 0.7),
    (1.0, 500, 0.99), (2.0, 1, 0.5)])
def test_filters_equal_transformers(temperature, top_k, top_p):
  torch = pytest.importorskip("torch")
  from transformers.generation import logits_process

  logits = 4 * np.random.default_rng(0).standard_normal((7, 61))
  logits = logits.astype(np.float32)
  warpers = [logits_process.TemperatureLogitsWarper(temperature)]
  if top_k:
    warpers.append(logits_process.TopKLogitsWarper(top_k))
  if top_p < 1:
    warpers.append(logits_process.TopPLogitsWarper(top_p))
  theirs = torch.tensor(logits)
  for warper in warpers:
    theirs = warper(None, theirs)
  ours = sampling_lib.filtered(
      jnp.asarray(logits), sampling_lib.sampling(temperature, top_k, top_p))
  np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)


def test_draws_follow_the_distribution():
  n = 4000
  p = np.asarray([0.5, 0.3, 0.15, 0.05])
  tokens = sampling_lib.draw(
      jax.random.key(3), jnp.broadcast_to(jnp.log(p), (n, 4)), jnp.arange(n),
      jnp.full(n, 7), sampling_lib.sampling(1.0, 0, 0.9))
  counts = np.bincount(np.asarray(tokens), minlength=4)
  expected = n * p[:3] / p[:3].sum()
  assert counts[3] == 0
  # Chi-squared with 2 degrees of freedom: 13.8 is exceeded once in 1000.
  assert ((counts[:3] - expected) ** 2 / expected).sum() < 13.8


def test_streamer_holds_back_incomplete_characters():
  tokenizer = tiny.byte_tokenizer()
  text = "né 🙂 中文, ok"
  ids = tokenizer.encode(text)
  assert len(ids) == len(text.encode())  # One token a byte.
  streamer = generate_lib.Streamer(tokenizer)
  pieces = [streamer.put(i) for i in ids]
  assert all("\ufffd" not in p for p in pieces)
  assert [p for p in pieces if p] == list(text)
  assert streamer.end() == ""


def test_streamer_gives_the_rest_at_the_end():
  tokenizer = tiny.byte_tokenizer()
  ids = [*tokenizer.encode("a🙂")[:3], tokenizer.eos_token_id]
  streamer = generate_lib.Streamer(tokenizer)
  pieces = [streamer.put(i) for i in ids]
  assert pieces == ["a", "", "", ""]
  assert streamer.end() == tokenizer.decode(ids, skip_special_tokens=True)[1:]

