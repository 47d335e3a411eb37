"""Hub names: the cache's layout without a network, and the hub's refusals."""

from __future__ import annotations

import json

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub import errors as hub_errors
import numpy as np
import pytest
import safetensors.numpy

from lora_jax import adapters as adapters_lib
from lora_jax import errors
from lora_jax.export import peft
from lora_jax.models import hf
from lora_jax.models import hub
from lora_jax.models import load
from tests import tiny

CONFIG = tiny.CONFIGS["mistral"]
COMMITS = {"main": "a" * 40, "v1.0": "b" * 40}


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """A cache with two revisions of org/model, and no network."""
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  place = tmp_path / "models--org--model"
  (place / "refs").mkdir(parents=True)
  for value, (revision, commit) in enumerate(COMMITS.items()):
    (place / "refs" / revision).write_text(commit)
    folder = place / "snapshots" / commit
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG.to_hf()))
    safetensors.numpy.save_file(
        {name: np.full(shape, value, np.float32)
         for name, shape in hf.names(CONFIG).items()},
        folder / "model.safetensors")
  return place


@pytest.mark.parametrize("name,value", [
    ("org/model", 0), ("org/model@v1.0", 1), (f"org/model@{'a' * 40}", 0)])
def test_a_cached_revision(cache, name, value):
  loaded = load.load(name)
  assert loaded.source == name and loaded.config == CONFIG
  assert (np.asarray(loaded.base.norm) == value).all()


def _fails(name, *parts):
  with pytest.raises(errors.UserError) as caught:
    load.load(name)
  assert "\n" not in str(caught.value)
  for part in (f"model.path={name} ", *parts):
    assert part in str(caught.value), str(caught.value)


def test_what_is_not_cached(cache):
  _fails("org/other", "no local folder", "HF_HUB_OFFLINE")
  _fails("org/model@v2.0", "HF_HUB_OFFLINE")
  for name in ("nothing", "a/b/c", "./a", "../a/b", "/a/b", "a/b@", "a b/c"):
    assert hub.split(name) is None
    _fails(name, "does not exist", "hub name")


def test_a_model_of_bin_files(cache):
  folder = cache / "snapshots" / COMMITS["main"]
  (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
  with pytest.raises(errors.UserError, match=r"neither.*\.bin.*save_pretr"):
    load.load("org/model")


def test_refusals_are_one_line(monkeypatch):
  def error(kind):  # Without the response that its __init__ asks for.
    return kind.__new__(kind, "Long\nstory")

  raised = {
      "org/gated": error(hub_errors.GatedRepoError),
      "org/private": error(hub_errors.RepositoryNotFoundError),
      "org/model@v9": error(hub_errors.RevisionNotFoundError),
      "org/down": OSError("the network\nis down")}

  def download(repo, revision=None, **_):
    raise raised[f"{repo}@{revision}" if revision else repo]

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  _fails("org/gated", "gated", "https://huggingface.co/org/gated", "hf auth")
  _fails("org/private", "private", "hf auth login")
  _fails("org/model@v9", "no revision v9", "org/model/commits")
  _fails("org/down", "(the network)", "check the name and the network")


def test_an_adapters_folder_names_base_and_revision_apart():
  config = adapters_lib.AdapterConfig(rank=2)
  for name, expected in {
      "org/model@v1": {"base_model_name_or_path": "org/model",
                       "revision": "v1"},
      "org/model": {"base_model_name_or_path": "org/model"},
      "/a/folder@2": {"base_model_name_or_path": "/a/folder@2"}}.items():
    got = peft.peft_config(config, adapters_lib.Adapters(), {}, name)
    keys = ("base_model_name_or_path", "revision")
    assert {k: got[k] for k in keys if k in got} == expected
