"""Pretraining: random weights that are trained, saved, and read elsewhere."""

from __future__ import annotations

import importlib
import json

import jax
import numpy as np
import pytest

from configs import pretrain_tiny
from experiments import blocks
from experiments import trained
from experiments.sweep import together
from lora_jax import api
from lora_jax.models import decoder
from lora_jax.models import init
from tests import tiny
from tests.experiments.test_bad_input import refused

FIELDS = "n_layers=3,d_model=32,d_ff=56,head_dim=8,tie_embeddings=true"
TOKENS = np.random.default_rng(0).integers(0, 250, (2, 12)).astype(np.int32)
FULL = dict(model__scratch=FIELDS, adapter__method="full",
            quant__format="none", quant__block_size=64,
            optim__learning_rate=1e-2)


def logits(model):
  found, _ = decoder.forward(
      model.config, model.base, model.adapters, TOKENS,
      np.broadcast_to(np.arange(12), TOKENS.shape), np.ones_like(TOKENS))
  return decoder.unembed(model.config, model.base, model.adapters, found)


@pytest.fixture(scope="module")
def folder(run_command, tmp_path_factory):
  folder = tmp_path_factory.mktemp("scratch") / "run"
  done = run_command(folder, train__steps=8, **FULL)
  assert not done.code, done.err
  return folder


def test_it_learns_and_transformers_reads_it(folder):
  import transformers

  summary = json.loads((folder / "summary.json").read_text())
  # Of 258 tokens none is known yet.
  assert abs(summary["initial_eval_loss"] - np.log(258)) < 0.1
  assert summary["final_eval_loss"] < summary["initial_eval_loss"] - 0.3
  said = json.loads((folder / "model" / "config.json").read_text())
  assert (said["num_hidden_layers"], said["hidden_size"],
          said["intermediate_size"], said["tie_word_embeddings"]) == (
              3, 32, 56, True)
  ours = api.load(str(folder / "model"))
  assert ours.fingerprint != summary["base_fingerprint"]
  theirs = transformers.AutoModelForCausalLM.from_pretrained(
      folder / "model", attn_implementation="eager").eval()
  np.testing.assert_allclose(
      logits(ours), tiny.torch_logits(theirs, TOKENS), atol=2e-5)


# A run more; test_reproduce.py has one that is the same again.
@pytest.mark.slow
def test_the_same_run_again_is_the_same(folder, run_command, tmp_path):
  done = run_command(tmp_path / "again", train__steps=8, **FULL)
  assert not done.code, done.err
  one, other = (
      (place / "model" / "model.safetensors").read_bytes()
      for place in (folder, tmp_path / "again"))
  assert one == other


# Two runs; models/test_scratch.py reads the same as a checkpoint.
@pytest.mark.slow
def test_an_adapter_stands_beside_quantised_random_weights(
    run_command, tmp_path):
  done = run_command(tmp_path / "run", model__scratch=FIELDS, train__steps=2,
                     adapter__init="pissa", seed=3)
  assert not done.code, done.err
  model = trained.from_workdir(str(tmp_path / "run"))  # Drawn again.
  assert model.config.n_layers == 3 and model.adapters.layers
  other = api.load(str(run_command.model), scratch=dict(
      part.split("=") for part in FIELDS.split(",")), seed=4)
  assert other.config == model.config
  assert other.fingerprint != model.fingerprint


def test_a_start_looks_at_the_weights_that_were_drawn(run_command):
  model = api.load(str(run_command.model), scratch={"n_layers": 1}, seed=3)
  adapted = model.adapt(method="lora", rank=2, init="pissa", targets="q_proj")
  drawn = init.fresh_base(jax.random.key(3), model.config)
  weight = drawn.layers["q_proj"].weight[0]
  a, b = (np.asarray(x[0]) for x in (
      adapted.adapters.layers["q_proj"].a, adapted.adapters.layers["q_proj"].b))
  left = np.asarray(adapted.base.layers["q_proj"].weight[0])
  scale = float(np.asarray(adapted.adapters.layers["q_proj"].scale).ravel()[0])
  np.testing.assert_allclose(left + scale * a @ b, weight, atol=1e-6)


def test_nothing_of_it_is_cached(run_command, monkeypatch):
  from lora_jax.models import base_cache

  monkeypatch.setattr(base_cache, "KEEP_BYTES", 0)
  monkeypatch.setattr(
      base_cache, "_keep", lambda *_: pytest.fail("kept"))
  api.load(str(run_command.model), scratch={}, seed=1)


@pytest.mark.parametrize("text, parts", [
    ("n_layer=3", ['"n_layer" is unknown', 'did you mean "n_layers"?']),
    ("n_layers", ['model.scratch: "n_layers" is not <name>=<value>',
                  "n_layers=6,d_model=256"]),
    ("d_model=30,head_dim=8,vocab_size=100", ["vocab_size=100 is less", "258"]),
])
def test_a_mistake_is_named(text, parts, run_command, tmp_path):
  refused(run_command(tmp_path / "run", **FULL | {"model__scratch": text}),
          2, "model.scratch", *parts)


def test_cells_share_what_was_drawn_of_one_seed():
  def config(seed, text):
    return {"model": {"path": "x", "scratch": text}, "seed": seed,
            "optim": {"name": "adamw"}}

  for key in (together.base_key, together.group_key):
    assert key(config(0, "")) == key(config(1, ""))
    assert key(config(0, FIELDS)) != key(config(1, FIELDS))
    assert key(config(0, FIELDS)) == key(config(0, FIELDS))


@pytest.mark.parametrize("study", ["formats", "double", "block_size"])
def test_studies_hold_out_what_the_tiny_base_has_not_seen(study):
  made = pretrain_tiny.get_config()
  blocks.check(made.to_dict())
  blocks.check(pretrain_tiny.get_config("runlocal").to_dict())
  found = importlib.import_module(f"configs.studies.{study}").get_config()
  assert found.model.path == "runs/pretrain_tiny/model"
  for name in ("path", "format", "split", "rows", "unique", "eval_rows",
               "eval_seed", "eval_max_length", "eval_path"):
    assert found.data[name] == made.data[name], name
  assert made.data.eval_seed >= 0
