"""A run that adds chat tokens: trained, killed, resumed, exported, read."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from experiments import trained
from lora_jax import api
from tests import tiny
from tests.experiments import conftest
from tests.experiments import test_bad_input
from tests.experiments import test_resume

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant"
    "\n{% endif %}")
RUN = dict(
    model__chat_template=TEMPLATE, model__add_tokens="<|im_start|>,<|im_end|>",
    model__pad_vocab_multiple=8, adapter__trainable_token_indices="new",
    adapter__modules_to_save="norm", train__samples=1, train__steps=6,
    data__max_length=128, optim__learning_rate=0.01,
    optim__lora_plus_ratio=4.0)
NEW = (258, 259)  # After 256 bytes, <s> and </s>.


@pytest.fixture(scope="module")
def tied_model(tmp_path_factory):
  return conftest.write_model(
      tmp_path_factory.mktemp("tokens") / "model",
      conftest.model_config(tie_embeddings=True))


@pytest.fixture(scope="module")
def whole(run_command, tied_model, tmp_path_factory):
  folder = tmp_path_factory.mktemp("tokens") / "run"
  done = run_command(folder, model__path=tied_model, **RUN)
  assert done.code == 0, done.err
  return folder


def test_the_new_rows_learn(whole):
  model = trained.from_workdir(str(whole))
  assert model.config.vocab_size == 264
  assert model.tokenizer.convert_tokens_to_ids("<|im_end|>") == 259
  rows = model.adapters.outer["embed_tokens"]
  assert tuple(rows.index.tolist()) == NEW == model.new_tokens
  assert model.stop_ids == (257, 259)  # </s> and <|im_end|>.
  moved = np.abs(rows.rows - model.base.embed_tokens[258:260]).max(1)
  assert (moved > 1e-3).all()
  lines = [x["eval_loss"] for x in conftest.metrics(whole) if "eval_loss" in x]
  assert lines[-1] < lines[0]
  saved = model.adapters.overrides.norm
  assert np.abs(saved - model.base.norm).max() > 1e-3


# A run more; test_resume.py kills runs.
@pytest.mark.slow
@pytest.mark.slow  # As test_resume, with other trees.
def test_a_kill_changes_nothing(whole, run_command, tied_model, tmp_path):
  folder = tmp_path / "run"
  process = run_command.start(
      folder, die="lora_jax.train.step:train_step:4", model__path=tied_model,
      **RUN)
  assert process.wait(conftest.LIMIT) == -9
  done = run_command(folder, model__path=tied_model, **RUN)
  assert done.code == 0, done.err
  assert "going on from step 2" in done.out
  assert test_resume.result(folder) == test_resume.result(whole)


def test_peft_computes_the_same_on_a_base_it_resized_itself(
    whole, tied_model):
  transformers = pytest.importorskip("transformers")
  torch = pytest.importorskip("torch")
  peft = pytest.importorskip("peft")

  model = trained.from_workdir(str(whole))
  # The tokens come with the folder.
  tokenizer = transformers.AutoTokenizer.from_pretrained(whole / "adapter")
  text = tokenizer.apply_chat_template(
      [{"role": "user", "content": "abc"}], tokenize=False,
      add_generation_prompt=True)
  ids = tokenizer(text, add_special_tokens=False)["input_ids"]
  assert ids[0] == 258 and 259 in ids
  theirs = transformers.AutoModelForCausalLM.from_pretrained(
      tied_model, attn_implementation="eager", dtype="float32")
  torch.manual_seed(0)
  theirs.resize_token_embeddings(264)
  loaded = peft.PeftModel.from_pretrained(theirs, whole / "adapter")
  tokens = np.asarray([ids], np.int32)
  positions = np.arange(len(ids), dtype=np.int32)[None]
  full = api.load(
      str(tied_model), add_tokens=("<|im_start|>", "<|im_end|>"),
      pad_vocab_multiple=8, chat_template=TEMPLATE,
  ).with_adapter(whole / "adapter")
  ours = tiny.logits(full.config, full.base, tokens, positions,
                     np.ones_like(tokens), full.adapters)
  assert tiny.distance(ours, tiny.torch_logits(loaded.eval(), tokens)) < 2e-5
  assert model.config == full.config


def test_the_merged_model_has_the_new_vocabulary(whole, tmp_path):
  model = trained.from_workdir(str(whole))
  model.save_merged(tmp_path / "m")
  config = json.loads((tmp_path / "m" / "config.json").read_text())
  assert config["vocab_size"] == 264 and config["tie_word_embeddings"]
  merged = api.load(str(tmp_path / "m"))
  tokens = np.asarray([[258, 97, 259, 98, 263]], np.int32)
  positions = np.arange(5, dtype=np.int32)[None]
  ours, theirs = (
      tiny.logits(m.config, m.base, tokens, positions, np.ones_like(tokens),
                  m.adapters) for m in (model, merged))
  assert tiny.distance(theirs, ours) < 2e-5
  assert merged.tokenizer.convert_tokens_to_ids("<|im_start|>") == 258


def test_a_base_without_the_tokens_is_refused(whole, tied_model):
  with pytest.raises(ValueError, match=r"resized; give the same model\.add"):
    api.load(str(tied_model)).with_adapter(whole / "adapter")


STARTS = dict(adapter__init="pissa", adapter__targets="q_proj,up_proj")


# Two runs more; tests/export/test_starts.py has such starts' folders.
@pytest.mark.slow
@pytest.mark.slow  # Six runs of the command, for a second kind of run.
def test_a_run_from_pissa_goes_on_exactly_or_not_at_all(
    run_command, tmp_path):
  """The residual is made again, and its digest compared."""
  whole = tmp_path / "whole"
  done = run_command(whole, **STARTS)
  assert done.code == 0, done.err
  folder = tmp_path / "run"
  process = run_command.start(
      folder, die="lora_jax.train.step:train_step:3", **STARTS)
  assert process.wait(conftest.LIMIT) == -9
  done = run_command(folder, **STARTS)
  assert done.code == 0, done.err
  assert "going on from step 2" in done.out
  assert test_resume.result(folder) == test_resume.result(whole)
  # What evaluate and the others read is what was trained.
  model = trained.from_workdir(str(folder))
  assert model.replaced is not None
  # The same work directory, but with another base behind the same path.
  other = tmp_path / "other"
  changed = conftest.write_model(
      tmp_path / "model", change=lambda base: jax.tree.map(
          lambda x: x * 1.5, base))
  done = run_command(other, model__path=changed, **STARTS)
  config = (other / "config.json").read_text()
  for file in (folder / "checkpoints",):
    file.rename(tmp_path / "kept")
  (other / "checkpoints").rename(tmp_path / "gone")
  (tmp_path / "kept").rename(other / "checkpoints")
  assert (other / "config.json").read_text() == config
  test_bad_input.refused(
      run_command(other, model__path=changed, **STARTS), 1, other,
      "digest", model.replaced[:12])
