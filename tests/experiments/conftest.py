"""A tiny model, a tiny dataset, and the real command on them."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import safetensors.numpy

from lora_jax.models import hf
from lora_jax.models import init
from tests import tiny
from tests.experiments import forks

ROOT = pathlib.Path(__file__).parents[2]
LETTERS = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# Seconds after which a command that should long be done is given up.
LIMIT = 240


def model_config(**changes):
  """Llama with a byte vocabulary."""
  return dataclasses.replace(
      tiny.CONFIGS["llama"], vocab_size=258, max_position=256,
      eos_ids=(257,), **changes)


def write_model(folder, config=None, key=0, change=lambda base: base):
  """A random model as a Hugging Face folder, its tokenizer beside it."""
  config = config or model_config()
  base = change(init.random_base(jax.random.key(key), config))
  folder.mkdir()
  (folder / "config.json").write_text(json.dumps(config.to_hf()))
  state = {name: np.ascontiguousarray(value)
           for name, value in hf.state(config, base, np.float32)}
  safetensors.numpy.save_file(state, folder / "model.safetensors")
  tiny.byte_tokenizer().save_pretrained(folder)
  return folder


def messages(n, seed=0, low=4, high=24):
  """`n` conversations of random letters."""
  rng = np.random.default_rng(seed)

  def text():
    letters = rng.choice(list(LETTERS), rng.integers(low, high))
    return "x" + "".join(letters)

  return [{"messages": [{"role": "user", "content": text()},
                        {"role": "assistant", "content": text()}]}
          for _ in range(n)]


def write_rows(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


@dataclasses.dataclass(frozen=True)
class Done:
  """A command that has ended."""

  code: int
  out: str
  err: str

  @property
  def errors(self) -> list[str]:
    return [x for x in self.err.splitlines() if x.startswith("error: ")]


@dataclasses.dataclass(frozen=True)
class Command:
  """`python -m experiments.run` on the tiny model, with its overrides."""

  model: pathlib.Path
  data: pathlib.Path
  logs: pathlib.Path
  server: forks.Server

  def argv(self, workdir=None, variant="", **overrides) -> list[str]:
    """The command line; `train__steps=3` is `--config.train.steps=3`."""
    values = {
        "model__path": self.model, "data__path": self.data,
        "data__max_length": 64, "data__eval_max_length": 64,
        "data__eval_rows": 6, "adapter__rank": 2, "quant__block_size": 8,
        "train__steps": 4, "train__batch_size": 2, "train__samples": 0,
        "train__checkpoint_every": 2, "train__sample_tokens": 4,
    } | overrides
    argv = [f"--config={ROOT}/configs/quickstart.py{variant}"]
    argv += [f"--config.{k.replace('__', '.')}={v}" for k, v in values.items()]
    return argv + ([f"--workdir={workdir}"] if workdir else [])

  def start(self, *args, cwd=ROOT, limit=None, die=None, out=None,
            **overrides) -> forks.Process:
    return self.server.start(
        self.argv(*args, **overrides), cwd, out or self.logs / "out",
        self.logs / "err", limit, die)

  def end(self, process) -> Done:
    code = process.wait(LIMIT)
    return Done(code, (self.logs / "out").read_text(),
                (self.logs / "err").read_text())

  def __call__(self, *args, **options) -> Done:
    return self.end(self.start(*args, **options))

  def kill_when(self, ready, *args, **options) -> None:
    """kill -9 as soon as `ready()`; fails if the command ends before."""
    process = self.start(*args, **options)
    deadline = time.monotonic() + LIMIT
    while not ready():
      assert process.poll() is None, (self.logs / "err").read_text()
      assert time.monotonic() < deadline
      time.sleep(0.001)
    process.kill()
    assert process.wait(LIMIT) == -9


def from_shell(argv, cwd=ROOT, **options) -> Done:
  """`python -m experiments.run ARGV` as a user types it."""
  done = subprocess.run(
      [sys.executable, "-m", "experiments.run", *argv], cwd=cwd, text=True,
      capture_output=True, timeout=LIMIT, check=False,
      env=os.environ | {"PYTHONPATH": str(ROOT)}, **options)
  return Done(done.returncode, done.stdout, done.stderr)


def metrics(folder) -> list[dict]:
  return [json.loads(x) for x in
          (folder / "metrics.jsonl").read_text().splitlines()]


def tensors(folder) -> bytes:
  return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
  return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def tiny_rows(tmp_path_factory):
  return write_rows(
      tmp_path_factory.mktemp("data") / "rows.jsonl", messages(24))


@pytest.fixture(scope="session")
def run_command(tiny_model, tiny_rows, tmp_path_factory):
  server = forks.Server(ROOT)
  yield Command(
      tiny_model, tiny_rows, tmp_path_factory.mktemp("logs"), server)
  server.close()
