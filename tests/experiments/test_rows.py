"""The rows of an experiment, and the paths it names."""

from __future__ import annotations

import types

import numpy as np
import pytest

from experiments import blocks
from experiments import reproduce
from experiments import rows as rows_lib
from experiments.sweep import together
from lora_jax import errors
from lora_jax.data import dataset
from lora_jax.data import templates
from tests.experiments import conftest


def encode(examples, **_):
  """One token a byte, every one of which is learnt."""
  return dataset.of([
      templates.Encoded(
          np.frombuffer(e.text.encode(), np.uint8).astype(np.int32),
          np.ones(len(e.text), np.float32), e.source) for e in examples])


TEXTS = [f"passage {i % 8}" for i in range(24)]


def data_block(tmp_path):
  path = conftest.write_rows(
      tmp_path / "rows.jsonl", [{"passage": text} for text in TEXTS])
  return {
      "path": str(path), "format": "text", "split": "train", "rows": 0,
      "system": "", "unique": True, "eval_path": "", "eval_rows": 3,
      "eval_seed": -1, "eval_max_length": 64, "max_length": 64,
      "overlong": "truncate"}


def test_no_row_is_held_out_and_trained_on(tmp_path, capsys):
  texts, block = TEXTS, data_block(tmp_path)
  model = types.SimpleNamespace(encode=encode)

  def datasets(seed=0):
    train, held, examples = rows_lib.datasets(
        model, {"data": block, "seed": seed})
    return [{bytes(e.tokens.astype(np.uint8)).decode() for e in rows}
            for rows in (train, held)], [e.text for e in examples], held

  (train, held), examples, rows = datasets()
  assert not train & held and train | held == set(texts)
  assert set(examples) == held
  assert [e.source.rpartition(":")[2] for e in rows] == [
      str(texts.index(text) + 1) for text in examples]
  assert "5 rows to train on" in (said := capsys.readouterr().out)
  assert "3 held out, 16 equal to earlier ones left out" in said
  assert datasets()[1] == examples
  # Which are held out may depend on another seed than the run's.
  assert datasets(1)[1] != examples
  block["eval_seed"] = 0
  (train, held), again, _ = datasets(1)
  assert again == examples
  # Nor on how many of the others are trained on.
  block["train_rows"] = 2
  (few, still), _, _ = datasets()
  assert len(few) == 2 and few < train and still == held
  block["train_rows"] = 6
  with pytest.raises(errors.UserError, match=r"train_rows=6, but 5 rows of"):
    datasets()
  block |= {"train_rows": 0, "unique": False}
  (train, held), _, _ = datasets()
  assert train & held


def test_cells_share_the_tokens_of_their_rows(tmp_path, monkeypatch):
  calls = []
  model = types.SimpleNamespace(
      encode=lambda examples, **_: calls.append(0) or encode(examples))
  monkeypatch.setattr(
      together.Bench, "model", lambda self, config: model)
  block = data_block(tmp_path)
  changes = ({}, {"train_rows": 2}, {"eval_rows": 4})
  configs = [
      {"data": block | change, "seed": seed, "model": {"path": "one"}}
      for seed in (0, 1) for change in changes]
  bench = together.Bench()
  shared = [bench.data(config) for config in configs]
  assert len(calls) == 1
  assert bench.data(configs[0]) is shared[0]
  for config, found in zip(configs, shared, strict=True):
    alone = rows_lib.datasets(model, config)
    for a, b in zip(found[:2], alone[:2], strict=True):
      assert reproduce.digest(a) == reproduce.digest(b)
    assert found[2] == alone[2]
  calls.clear()
  bench.data(configs[0] | {"model": {"path": "other"}})
  bench.data(configs[0] | {"data": block | {"unique": False}})
  assert len(calls) == 2  # Another tokenizer; other rows.


def test_what_a_run_has_not_made_yet(tmp_path, monkeypatch):
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs" / "first.py").touch()
  monkeypatch.chdir(tmp_path)
  with pytest.raises(errors.UserError, match=(
      r"runs/first/model does not exist; .*--config=configs/first\.py "
      r"--workdir=runs/first$")):
    blocks.locate("runs/first/model")
  for path in ("runs/first", "runs/second/model", "owner/name", "x.gguf"):
    assert blocks.locate(path) == path
  (tmp_path / "runs" / "first" / "model").mkdir(parents=True)
  assert blocks.locate("runs/first/model") == "runs/first/model"
