"""The files of a work directory: written whole, or appended line by line.

  config.json       the resolved config
  environment.json  versions, device, threads, commit, seeds
  inputs.json       digests of the base and the rows
  metrics.jsonl     one object a logged step or evaluation
  evals/            per-row losses of each evaluation
  samples.md        generations during training
  checkpoints/      orbax
  adapter/          PEFT format, the best step
  start/            likewise, before the first; with an adapter.init that looks
                    at rows only
  summary.json      the result
  loss.png          the curves
  sinks/            ids of the run at W&B, MLflow; with log.sinks only, as are
                    tensorboard/ and wandb/

Of several processes one writes (`processes.writes`); in the others the
functions of this module do nothing.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any

import jax

from lora_jax import errors
from lora_jax import processes


def write_bytes(path: pathlib.Path, data: bytes) -> None:
  """Replaces `path` atomically: it holds the old bytes or the new ones.

  Raises:
    errors.UserError: if it cannot be written.
  """
  if not processes.writes():
    return
  temporary = path.with_name(path.name + ".tmp")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(temporary, "wb") as f:
      f.write(data)
      f.flush()
      os.fsync(f.fileno())
    temporary.replace(path)
  except OSError as error:
    raise unwritable(path, error) from error


def write_json(path: pathlib.Path, value: Any) -> None:
  """`write_bytes` of indented JSON."""
  write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: pathlib.Path) -> Any:
  """A JSON file's value; None if it is not there, or cut short."""
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError):
    return None


def unwritable(path: pathlib.Path, error: OSError) -> errors.UserError:
  """The one-line error for a path that could not be written."""
  return errors.UserError(
      f"{path}: {error.strerror or error}; free space, mend its permissions, "
      "or choose another --workdir (what was written so far is intact)")


class Metrics:
  """`metrics.jsonl`, cut to the restored step when a run goes on."""

  def __init__(self, path: pathlib.Path, step: int):
    self._path = path
    try:
      kept = [line for line in _lines(path) if line["step"] <= step]
      text = "".join(json.dumps(line) + "\n" for line in kept)
      write_bytes(path, text.encode())
      self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed below)
    except OSError as error:
      raise unwritable(path, error) from error

  def write(self, values: dict[str, Any]) -> None:
    """Appends a line.

    Raises:
      errors.UserError: if it cannot be written whole; the lines before stay,
        and what was written of this one is dropped when the run goes on.
    """
    data = (json.dumps(values) + "\n").encode()
    try:
      # Unbuffered: a line that failed must not be tried again by `close`.
      while data:
        data = data[self._file.write(data):]
    except OSError as error:
      raise unwritable(self._path, error) from error

  def sync(self) -> None:
    """Waits for the disk: a checkpoint must not outlive its metrics.

    Raises:
      errors.UserError: if the disk fails.
    """
    try:
      os.fsync(self._file.fileno())
    except OSError as error:
      raise unwritable(self._path, error) from error

  def close(self) -> None:
    self._file.close()


class _NoMetrics:
  """`Metrics` of a process that does not write."""

  def write(self, values: dict[str, Any]) -> None:
    pass

  def sync(self) -> None:
    pass

  def close(self) -> None:
    pass


def metrics(path: pathlib.Path, step: int) -> Metrics | _NoMetrics:
  """`Metrics` in the process that writes, and its shape in the others."""
  return Metrics(path, step) if processes.writes() else _NoMetrics()


def _lines(path: pathlib.Path) -> list[dict[str, Any]]:
  if not path.exists():
    return []
  lines = []
  for text in path.read_bytes().split(b"\n"):
    try:
      line = json.loads(text)
      line["step"]
    except (ValueError, TypeError, KeyError):
      break  # The line a kill cut short; what follows cannot be older.
    lines.append(line)
  return lines


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
  """Objects of a `metrics.jsonl`, up to the first line cut short."""
  return _lines(path)


PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy",
    "transformers", "tokenizers", "datasets", "safetensors", "ml-collections")


def environment(seed: int) -> dict[str, Any]:
  """What a result depends on beside its config."""
  versions: dict[str, str | None] = {}
  for name in PACKAGES:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      versions[name] = None
  device = jax.devices()[0]
  return {
      "python": platform.python_version(),
      "platform": platform.platform(),
      "versions": versions,
      "device": device.device_kind,
      "backend": device.platform,
      "device_count": jax.device_count(),
      "process_count": jax.process_count(),
      "threads": len(os.sched_getaffinity(0)),
      "xla_flags": os.environ.get("XLA_FLAGS", ""),
      "git_commit": git_commit(),
      "command": sys.argv,
      "seeds": {"run": seed},
  }


def git_commit() -> str | None:
  """Commit of this checkout, `-dirty` if changed; None outside of git."""
  here = pathlib.Path(__file__).parent
  try:
    run = lambda *args: subprocess.run(
        ["git", "-C", str(here), *args], capture_output=True, text=True,
        check=True, timeout=20).stdout.strip()
    commit = run("rev-parse", "HEAD")
    return commit + ("-dirty" if run("status", "--porcelain") else "")
  except (OSError, subprocess.SubprocessError):
    return None
