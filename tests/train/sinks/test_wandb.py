"""W&B's offline runs, read back from their files."""

from __future__ import annotations

import json
import struct

import pytest

from lora_jax.train import sinks
from tests.train.sinks import test_fan

pytest.importorskip("wandb")

BLOCK, HEADER = 32768, 7


def _records(path):
  """Records of a `.wandb` file: LevelDB's log format after 7 bytes.

  https://github.com/google/leveldb/blob/main/doc/log_format.md: blocks of 32
  KiB; in them crc32 (4 bytes), length (2), type (1: whole, 2, 3, 4: first,
  middle and last piece of a record), then the data.
  """
  from wandb.proto import wandb_internal_pb2

  data = path.read_bytes()
  assert data[:4] == b":W&B"
  place, pieces = HEADER, b""
  while place + HEADER <= len(data):
    if BLOCK - place % BLOCK < HEADER:
      place += BLOCK - place % BLOCK
      continue
    _, length, kind = struct.unpack("<IHB", data[place:place + HEADER])
    pieces += data[place + HEADER:place + HEADER + length]
    place += HEADER + length
    if kind in (1, 4):
      record = wandb_internal_pb2.Record()
      record.ParseFromString(pieces)
      yield record
      pieces = b""


def _history(path):
  """(run id, config, rows, summary) of an offline run."""
  run, config, rows, summary = None, {}, [], {}
  items = lambda items: {
      x.key or ".".join(x.nested_key): json.loads(x.value_json)
      for x in items}
  for record in _records(path):
    kind = record.WhichOneof("record_type")
    if kind == "run":
      run = record.run.run_id
      config |= items(record.run.config.update)
    elif kind == "history":
      rows.append(items(record.history.item))
    elif kind == "summary":
      summary |= items(record.summary.update)
  return run, config, rows, summary


def test_a_killed_run_has_every_step_once(tmp_path, monkeypatch):
  folder = tmp_path / "run"
  log = sinks.LogConfig(sinks="wandb", wandb_mode="offline", timeout=60.0)
  test_fan.killed_then_resumed(folder, log, monkeypatch)
  files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
  assert len(files) == 2
  parts = [_history(path) for path in files]
  assert len({run for run, *_ in parts}) == 1
  assert parts[0][0] == json.loads(
      (folder / "sinks/wandb.json").read_text())["id"]
  assert parts[0][1]["train"] == {"steps": 8} and parts[0][1]["seed"] == 3
  rows = [row for part in parts for row in part[2]]
  steps = [row["_step"] for row in rows]
  assert steps == sorted(set(steps)) == list(range(9))
  assert [row["loss"] for row in rows[1:]] == [
      pytest.approx(1 / i) for i in range(1, 9)]
  assert [row["_step"] for row in rows if "eval_loss" in row] == [
      0, 2, 4, 6, 8]
  assert [row["_step"] for row in rows if any(
      key.startswith("samples") for key in row)] == [0, 8]
  assert parts[1][3]["summary/loss"] == 0.25
  tables = list(folder.glob("wandb/offline-run-*/files/media/table/*.json"))
  assert any(json.loads(t.read_text())["data"] == [[1, "one"], [2, "two"]]
             for t in tables)


def test_without_credentials_it_is_dropped(tmp_path, monkeypatch):
  """Online needs a key; nobody is asked for one."""
  warned = []
  for name in ("WANDB_API_KEY", "WANDB_MODE"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
  monkeypatch.setattr(
      test_fan.logging, "warning", lambda text, *a: warned.append(text % a))
  test_fan.fit(tmp_path / "run", sinks.LogConfig(sinks="wandb"),
               monkeypatch=monkeypatch)
  assert len(warned) == 1
  assert "wandb is dropped (RuntimeError: no credentials; run" in warned[0]
  assert len(test_fan.lines(tmp_path / "run")) == 7
