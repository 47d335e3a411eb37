"""`experiments.quantize`, and the commands that use what it makes."""

from __future__ import annotations

import re
import shutil

from absl import flags
import jax
import numpy as np
import pytest

from configs import common
from experiments import quantize
from experiments import trained
from lora_jax import api
from lora_jax import errors
from lora_jax.models import base_cache
from lora_jax.models import hf


@pytest.fixture
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "cache"))
  return tmp_path / "cache" / "bases"


def run(*argv):
  values = flags.FlagValues()
  quantize.define_flags(values)
  values(["quantize", *map(str, argv)])
  quantize.main(values)


def assert_same(a, b):
  assert jax.tree.structure(a.base) == jax.tree.structure(b.base)
  jax.tree.map(np.testing.assert_array_equal, a.base, b.base)
  assert a.fingerprint == b.fingerprint and a.config == b.config


def test_the_cache_is_filled_listed_used_and_cleared(
    cache, tiny_model, capsys, monkeypatch):
  fresh = api.load(str(tiny_model), quant="nf4", cache=False)
  run(f"--model={tiny_model}", "--format=nf4")
  out = capsys.readouterr().out
  folder, = cache.glob("*-*")
  assert out.splitlines()[-1] == str(folder)
  size = sum(x.nbytes for x in jax.tree.leaves(fresh.base))
  count = sum(np.prod(s) for s in hf.names(fresh.config).values())
  assert f"{8 * size / count:.3f} bits for each of {count:,}" in out
  assert re.search(r"written at [\d,]+ MB/s", out)

  def read(self, name):
    raise AssertionError(f"{name} is read")

  monkeypatch.setattr(hf.Folder, "read", read)
  assert_same(api.load(str(tiny_model), quant="nf4"), fresh)
  with pytest.raises(AssertionError, match="is read"):
    api.load(str(tiny_model), quant="nf4", cache=False)
  run("--list")
  out = capsys.readouterr().out
  assert str(folder) in out and f"{tiny_model}: nf4 block_size=64" in out
  assert "1 bases" in out
  run("--clear")
  assert "removed" in capsys.readouterr().out and not cache.exists()


def test_a_run_keeps_its_base_unless_told_otherwise(
    cache, tiny_model, tmp_path, monkeypatch):
  monkeypatch.setattr(base_cache, "KEEP_BYTES", 0)
  config = common.get_config()
  config.model.path, config.adapter.method = str(tiny_model), "none"
  for kept in (False, True):
    config.model.cache = kept
    folder = tmp_path / f"run{kept}"
    folder.mkdir()
    (folder / "config.json").write_text(config.to_json_best_effort())
    trained.from_workdir(str(folder))
    assert cache.exists() == kept


def test_a_folder_is_a_model_of_its_own(cache, tiny_model, tmp_path, capsys):
  original = tmp_path / "original"
  shutil.copytree(tiny_model, original)
  fresh = api.load(str(original), quant="nf4", cache=False)
  out = tmp_path / "out"
  run(f"--model={original}", "--format=nf4", f"--out={out}")
  assert capsys.readouterr().out.splitlines()[-1] == str(out)
  shutil.rmtree(original)
  moved = tmp_path / "elsewhere"
  out.rename(moved)
  model = api.load(str(moved), quant="nf4")
  assert_same(model, fresh)
  assert model.source == str(moved)
  prompt = ["What?"]
  assert model.chat(prompt, max_new_tokens=3) == fresh.chat(
      prompt, max_new_tokens=3)
  assert not cache.exists()
  for quant in ("none", "int4"):
    with pytest.raises(errors.UserError, match="is stored as nf4 block_size"):
      api.load(str(moved), quant=quant)
  with pytest.raises(errors.UserError, match="converted already"):
    run(f"--model={moved}", "--format=int4")
  with pytest.raises(errors.UserError, match=r"--out=.* is not empty"):
    run(f"--model={moved}", f"--out={moved}")
  (moved / "manifest.json").write_text("{")
  with pytest.raises(errors.UserError, match=r"manifest\.json cannot be read"):
    api.load(str(moved), quant="nf4")


@pytest.mark.parametrize("argv, message", [
    (["--format=nf4"], "--model is missing"),
    (["--model=x", "--format=nf5"], 'did you mean "nf4"'),
    (["--model=x", "--skip=q_prj"], 'did you mean "q_proj"'),
    (["--model=x", "--block_size=3"], "quant.block_size=3"),
    (["--model=x", "--dtype=float64"], "--dtype"),
])
def test_mistakes(cache, argv, message):
  with pytest.raises(errors.UsageError, match=message):
    run(*argv)


def test_an_unwritable_cache_is_an_error_of_this_command(
    cache, tiny_model):
  cache.parent.mkdir()
  cache.write_text("")
  with pytest.raises(errors.UserError, match="choose another folder"):
    run(f"--model={tiny_model}")
