"""Programs that print JSON lines, each in a process of its own.

A part has the whole device for itself: what the one before it allocated is
gone, its peak memory is its own, and if it is killed the others go on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

from experiments.bench import lines

ROOT = pathlib.Path(__file__).parents[2]


class Failed(Exception):
  """A program ended badly; the message is one line."""


def json_lines(
    argv: Sequence[str], limit: float, request: str = "",
    env: Mapping[str, str] | None = None) -> Iterator[lines.Line]:
  """The JSON objects that a program prints, as they come.

  Args:
    argv: the program.
    limit: seconds after which it is killed.
    request: for its stdin.
    env: added to the environment.

  Yields:
    The objects; other lines are dropped.

  Raises:
    Failed: if it does not end with code 0 within the limit; says the last
      line of its stderr.
  """
  with tempfile.TemporaryFile("w+", errors="replace") as log:
    process = subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
        text=True, errors="replace", env={**os.environ, **(env or {})})
    assert process.stdin is not None and process.stdout is not None
    late = threading.Event()

    def give_up():
      late.set()
      process.kill()

    timer = threading.Timer(limit, give_up)
    timer.start()
    try:
      try:
        process.stdin.write(request)
        process.stdin.close()
      except BrokenPipeError:
        pass  # It has ended already, and its code says how.
      for text in process.stdout:
        line = _parse(text)
        if line is not None:
          yield line
      code = process.wait()
    finally:
      timer.cancel()
      process.kill()
      process.wait()
    if late.is_set():
      raise Failed(f"no end after {limit:g} s (limit): killed")
    if code:
      log.seek(0)
      said = [x.strip() for x in log.read().splitlines() if x.strip()]
      ended = f"signal {-code}" if code < 0 else f"exit code {code}"
      raise Failed(f"{ended}: {said[-1][:300] if said else 'nothing said'}")


def _parse(text: str) -> lines.Line | None:
  try:
    line = json.loads(text)
  except ValueError:
    return None
  return line if isinstance(line, dict) else None


def run(
    part: str, config: Mapping[str, Any], emit: lines.Emit,
    env: Mapping[str, str] | None = None) -> None:
  """Runs a part of `child`; its failure is a line as well.

  Args:
    part: a key of `child.PARTS`, or `"startup"`.
    config: resolved; a JSON value.
    emit: takes the lines.
    env: added to the environment.
  """
  path = os.pathsep.join(
      filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
  request = {"part": part, "config": config, "started": time.time()}
  try:
    for line in json_lines(
        [sys.executable, "-m", "experiments.bench.child"], config["limit"],
        json.dumps(request), {"PYTHONPATH": path, **(env or {})}):
      emit(line)
  except Failed as error:
    emit({"part": part, "name": "all", "error": str(error)})
