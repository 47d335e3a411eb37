"""The README's Python example runs as it stands."""

from __future__ import annotations

import pathlib
import re

from tests import tiny
from tests.experiments import conftest

README = pathlib.Path(__file__).parents[2] / "README.md"


def test_the_library_example(tiny_model, tmp_path, monkeypatch, capsys):
  code = re.search(r"```python\n(.*?)```", README.read_text(), re.S)[1]
  lines = [x for x in code.splitlines() if x.strip()]
  assert len(lines) <= 22
  monkeypatch.chdir(tmp_path)
  conftest.write_rows(tmp_path / "train.jsonl", conftest.messages(60))
  code = code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(tiny_model))
  names: dict = {}
  exec(compile(code, str(README), "exec"), names)
  assert names["after"].loss < names["before"].loss
  assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
  assert "nats a token" in capsys.readouterr().out
  trained = names["model"].adapters
  read = names["again"].adapters
  for name, adapter in trained.layers.items():
    assert tiny.distance(read.layers[name].a, adapter.a) == 0
