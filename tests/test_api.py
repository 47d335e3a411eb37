"""What a model passes on to training, evaluation and generation."""

from __future__ import annotations

import types

import jax
import numpy as np
import pytest

from lora_jax import api
from lora_jax import host as host_lib
from lora_jax.data import dataset
from lora_jax.data import templates
from lora_jax.evaluate import generate
from lora_jax.evaluate import perplexity
from lora_jax.kernels import attention
from lora_jax.models import init
from lora_jax.train import loop
from tests import tiny


class Caught(Exception):
  pass


def _catch(monkeypatch, module, name):
  def caught(*args, **kwargs):
    raise Caught(args, kwargs)
  monkeypatch.setattr(module, name, caught)


def test_attention_and_the_layout_of_rows(monkeypatch, tmp_path):
  config = tiny.CONFIGS["llama"]
  model = api.Model(
      config=config, base=init.random_base(jax.random.key(0), config),
      tokenizer=types.SimpleNamespace(chat_template=None, eos_token_id=0),
      fingerprint="0" * 64, source="tiny", attention="plain").adapt(rank=2)
  rows = dataset.of([templates.Encoded(
      tokens=np.arange(5, dtype=np.int32), weights=np.ones(5, np.float32))])
  _catch(monkeypatch, loop, "fit")
  for packing, layout in (True, "packed"), (False, "single"):
    with pytest.raises(Caught) as caught:
      model.train(rows, workdir=tmp_path, packing=packing)
    settings = caught.value.args[0][0].settings
    assert settings.attention == attention.Options("plain", layout)
  single = attention.Options("plain", "single")
  _catch(monkeypatch, perplexity, "row_losses")
  with pytest.raises(Caught) as caught:
    model.evaluate(rows)
  assert caught.value.args[1]["attention"] == single
  _catch(monkeypatch, generate, "generate")
  with pytest.raises(Caught) as caught:
    model.generate([[1]])
  assert caught.value.args[1]["attention"] == single


def test_what_is_offloaded_reaches_the_step(monkeypatch, tmp_path):
  config = tiny.CONFIGS["llama"]
  model = api.Model(
      config=config, base=init.random_base(jax.random.key(0), config),
      tokenizer=None, fingerprint="0" * 64, source="tiny",
      offload=("activations", "optimiser")).adapt(rank=2)
  rows = dataset.of([templates.Encoded(
      tokens=np.arange(5, dtype=np.int32), weights=np.ones(5, np.float32))])
  _catch(monkeypatch, loop, "fit")
  with pytest.raises(Caught) as caught:
    model.train(rows, workdir=tmp_path)
  task, state = caught.value.args[0][:2]
  assert task.settings.offload == ("activations", "optimiser")
  moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
  assert moments and all(map(host_lib.in_host, moments))
