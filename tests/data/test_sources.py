"""Every kind of file, and the message of every broken one."""

from __future__ import annotations

import json

import pytest

from lora_jax import errors
from lora_jax.data import sources

ROWS = [{"prompt": f"p{i},\u2028\n", "completion": f"c {i}"} for i in range(3)]


def _write(path, text):
  path.write_text(text, encoding="utf-8")
  return path


def _texts(examples):
  return [{"prompt": e.prompt, "completion": e.completion} for e in examples]


def _jsonl(rows):
  return "\n\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n"


def test_json_and_jsonl(tmp_path):
  path = _write(tmp_path / "a.json", json.dumps(ROWS))
  examples = sources.read(path)
  assert _texts(examples) == ROWS
  assert [e.source for e in examples] == [f"{path}:{i}" for i in (1, 2, 3)]
  path = _write(tmp_path / "a.jsonl", "\ufeff" + _jsonl(ROWS))
  examples = sources.read(str(path), "prompt_completion")
  assert _texts(examples) == ROWS
  assert [e.source for e in examples] == [f"{path}:{i}" for i in (1, 3, 5)]


def test_csv(tmp_path):
  path = _write(tmp_path / "a.csv",
                'question,answer\n"What, 1+1?\nNow",2\nx,"a ""b"""\n')
  examples = sources.read(path)
  assert [[m["content"] for m in e.messages] for e in examples] == [
      ["What, 1+1?\nNow", "2"], ["x", 'a "b"']]
  assert [e.source for e in examples] == [f"{path}:3", f"{path}:4"]


def test_parquet_and_saved_datasets(tmp_path):
  datasets = pytest.importorskip("datasets")
  data = datasets.Dataset.from_list(ROWS)
  data.to_parquet(tmp_path / "a.parquet")
  examples = sources.read(tmp_path / "a.parquet")
  assert _texts(examples) == ROWS
  assert examples[1].source == f"{tmp_path / 'a.parquet'}:2"

  data.save_to_disk(tmp_path / "one")
  assert _texts(sources.read(tmp_path / "one")) == ROWS
  datasets.DatasetDict(train=data, test=data.select([2])).save_to_disk(
      tmp_path / "two")
  assert _texts(sources.read(tmp_path / "two")) == ROWS
  assert _texts(sources.read(tmp_path / "two", split="test")) == ROWS[2:]
  with pytest.raises(errors.UserError, match='did you mean "train"'):
    sources.read(tmp_path / "two", split="trian")


def test_messages_from_a_saved_dataset(tmp_path):
  datasets = pytest.importorskip("datasets")
  turns = [{"role": "user", "content": "q"},
           {"role": "assistant", "content": "a"}]
  datasets.Dataset.from_list([{"messages": turns}]).save_to_disk(
      tmp_path / "m")
  assert sources.read(tmp_path / "m")[0].messages == turns


def test_folder_of_files(tmp_path):
  _write(tmp_path / "b.jsonl", _jsonl(ROWS[2:]))
  _write(tmp_path / "a.json", json.dumps(ROWS[:2]))
  _write(tmp_path / "notes.txt", "not read")
  assert _texts(sources.read(tmp_path)) == ROWS


def test_hub(monkeypatch, tmp_path):
  datasets = pytest.importorskip("datasets")
  monkeypatch.chdir(tmp_path)
  calls = []

  def load_dataset(name, subset, split):
    calls.append((name, subset, split))
    if name == "owner/none":
      raise ConnectionError("no\nnetwork")
    return ROWS

  monkeypatch.setattr(datasets, "load_dataset", load_dataset)
  examples = sources.read("owner/name", split="test")
  assert _texts(examples) == ROWS
  assert examples[0].source == "owner/name:1"
  sources.read("owner/name:main")
  assert calls == [
      ("owner/name", None, "test"), ("owner/name", "main", "train")]
  with pytest.raises(errors.UserError, match=r"hub gave .no network.; correct"):
    sources.read("owner/none")
  (tmp_path / "owner").mkdir()  # Now it is a mistyped path.
  with pytest.raises(errors.UserError, match="owner/none: no such file"):
    sources.read("owner/none")


@pytest.mark.parametrize("name, content, match", [
    ("a.jsonl", '{"text": "x"}\n{"text": "y"\n',
     "a.jsonl:2: malformed JSON at column 13"),
    ("a.jsonl", "", "a.jsonl: the file is empty"),
    ("a.jsonl", "\n \n", "the file is empty"),
    ("a.jsonl", "[1]\n", "a.jsonl:1: the row is a list"),
    ("a.jsonl", '{"text": "x"}\n{"body": "y"}\n',
     'a.jsonl:2: the key "text" of format text is missing'),
    ("a.jsonl", '{"prompt": "x", "completion": ""}\n',
     'a.jsonl:1: "completion" is empty'),
    ("a.json", '[{"text": "x"},\n {"text": }]', "a.json:2: malformed JSON at "
     "column 11"),
    ("a.json", '{"text": "x"}', "holds a dict, not a list"),
    ("a.json", "[]", "the file is empty"),
    ("a.json", "", "the file is empty"),
    ("a.csv", "text\nx,y\n", "a.csv:2: more cells than the header's 1 col"),
    ("a.csv", 'text\n"x\n', "malformed CSV"),
    ("a.csv", "prompt,completion\nx\n", 'a.csv:2: the key "completion"'),
    ("a.csv", "text\n", "the file is empty"),
    ("a.parquet", "x", "not a readable Parquet file"),
    ("a.xml", "x", 'type ".xml" is unknown; convert it to one of .json'),
])
def test_broken_files(tmp_path, name, content, match):
  path = _write(tmp_path / name, content)
  with pytest.raises(errors.UserError, match=match) as info:
    sources.read(path)
  assert "\n" not in str(info.value)


def test_not_utf8(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_bytes(b'{"text": "x"}\n{"text": "caf\xe9"}\n')
  with pytest.raises(errors.UserError,
                     match=r"a.jsonl:2: byte 27 \(0xe9\) is not UTF-8"):
    sources.read(path)


def test_missing(tmp_path):
  _write(tmp_path / "train.jsonl", "")
  with pytest.raises(errors.UserError, match=r'did you mean ".*/train.jsonl"'):
    sources.read(tmp_path / "trian.jsonl")
  with pytest.raises(errors.UserError, match="nor a folder"):
    sources.read(tmp_path / "none" / "train.jsonl")
  (tmp_path / "empty").mkdir()
  with pytest.raises(errors.UserError, match="neither a saved dataset nor"):
    sources.read(tmp_path / "empty")
  with pytest.raises(errors.UserError, match='did you mean "alpaca"'):
    sources.read(tmp_path / "train.jsonl", "alpacca")
