"""Two processes of four devices each: one run, written once."""

from __future__ import annotations

import json
import pathlib
import socket
import subprocess
import sys
import time

import pytest

from lora_jax import errors
from lora_jax import processes
from tests import devices as devices_lib
from tests.experiments import conftest

# Two processes hang together or not at all: nothing here may take longer.
LIMIT = 500
# Compiling for eight devices: minutes on two busy cores.
pytestmark = pytest.mark.timeout(2 * LIMIT)
RUN = dict(
    mesh__data=2, mesh__fsdp=2, mesh__tensor=2, train__batch_size=8,
    train__steps=4, train__eval_every=2, train__checkpoint_every=2,
    train__samples=1, quant__block_size=8)


# Two devices: what the default run of the tests can afford.
SMALL = dict(
    mesh__data=1, mesh__tensor=1, train__batch_size=4, train__steps=2,
    train__checkpoint_every=0, quant__block_size=8)


def start(run_command, folder, logs, count, devices=8, options=RUN):
  """The processes of a run of `devices` in all, their stderr in `logs`."""
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  found = []
  for i in range(count):
    more = {} if count == 1 else dict(
        distributed__coordinator=f"localhost:{port}",
        distributed__processes=count, distributed__process=i)
    with (open(logs / f"out{i}", "w") as out,
          open(logs / f"err{i}", "w") as err):
      found.append(subprocess.Popen(
          [sys.executable, "-m", "experiments.run",
           *run_command.argv(folder, **options, **more)],
          cwd=conftest.ROOT, stdout=out, stderr=err,
          env=devices_lib.environ(devices // count)))
  return found


def end(run, logs):
  for i, process in enumerate(run):
    assert process.wait(LIMIT) == 0, (logs / f"err{i}").read_text()[-3000:]


@pytest.fixture(scope="module")
def whole(run_command, tmp_path_factory):
  """The work directory of one process with eight devices."""
  folder = tmp_path_factory.mktemp("one")
  end(start(run_command, folder / "run", folder, 1), folder)
  return folder / "run"


def check(folder, whole):
  """The same lines, evaluations and files, and each of them once."""
  ours, theirs = (conftest.metrics(f) for f in (folder, whole))
  assert [x["step"] for x in ours] == [x["step"] for x in theirs]
  for a, b in zip(ours, theirs):
    assert a.keys() == b.keys()
    for key in a.keys() - {"tokens_per_s"}:
      assert a[key] == pytest.approx(b[key], rel=1e-5), key
  for step in (0, 2, 4):
    a, b = (json.loads((f / "evals" / f"{step}.json").read_text())
            for f in (folder, whole))
    assert a["nll"] == pytest.approx(b["nll"], rel=1e-5)
    assert a["weight"] == b["weight"]
  files = [{str(p.relative_to(f)) for p in f.rglob("*")
            if "checkpoints/" not in str(p)} for f in (folder, whole)]
  assert files[0] == files[1]
  assert (folder / "config.json").read_bytes() == (
      whole / "config.json").read_bytes()
  environment = json.loads((folder / "environment.json").read_text())
  assert environment["process_count"] == 2
  digests = {p.name for p in (folder / "checkpoints/sha256").iterdir()}
  assert digests == {"2.json", "4.json"}


def test_two_processes_compute_what_one_does(run_command, tmp_path):
  one, two = tmp_path / "one", tmp_path / "two"
  one.mkdir()
  two.mkdir()
  runs = [start(run_command, one / "run", one, 1, 1, SMALL),
          start(run_command, two / "run", two, 2, 2,
                SMALL | dict(mesh__fsdp=2))]
  end(runs[0], one)
  end(runs[1], two)
  alone, shared = (conftest.metrics(f / "run") for f in (one, two))
  assert [x["step"] for x in alone] == [0, 1, 2, 2] == [
      x["step"] for x in shared]
  for a, b in zip(alone, shared):
    for key in a.keys() - {"tokens_per_s"}:
      assert a[key] == pytest.approx(b[key], rel=1e-5), key
  assert {p.name for p in (one / "run").iterdir()} == {
      p.name for p in (two / "run").iterdir()}
  assert "step" not in (two / "out1").read_text()


# Slow: five processes compile for eight devices, and one dies of silence.
@pytest.mark.slow
def test_killed_processes_go_on_and_end_as_one(run_command, whole, tmp_path):
  folder = tmp_path / "run"
  run = start(run_command, folder, tmp_path, 2)
  deadline = time.monotonic() + LIMIT
  while not (folder / "checkpoints/sha256/2.json").exists():
    assert time.monotonic() < deadline
    assert run[0].poll() is None, (tmp_path / "err0").read_text()[-3000:]
    time.sleep(0.01)
  # One dies: the other must notice and end by itself, soon.
  run[1].kill()
  killed = time.monotonic()
  assert run[0].wait(LIMIT) != 0
  assert time.monotonic() - killed < 150
  run[1].wait()
  end(run := start(run_command, folder, tmp_path, 2), tmp_path)
  assert "going on from step 2" in (tmp_path / "out0").read_text()
  assert "step 4/4" in (tmp_path / "out0").read_text()
  assert "step" not in (tmp_path / "out1").read_text()  # Only gloo prints.
  check(folder, whole)


@pytest.mark.parametrize("block, message", [
    (dict(coordinator="host0"), 'coordinator="host0" is not an address'),
    (dict(coordinator="host0:1", processes=2), "process=-1 of distributed"),
    (dict(coordinator="host0:1", processes=2, process=2), "out of range"),
])
def test_an_incomplete_block_is_named(block, message):
  with pytest.raises(errors.UsageError, match=message):
    processes.connect(processes.DistributedConfig(**block))


def test_without_a_coordinator_nothing_is_connected():
  processes.connect(processes.DistributedConfig())
  assert not processes.connected()
  assert processes.writes()
  processes.barrier("alone")


def test_a_run_may_go_on_on_other_devices(tmp_path):
  from experiments import run

  config = {"seed": 0, "mesh": {"fsdp": 1}, "optim": {"b1": 0.9}}
  run.open_workdir(tmp_path, config)
  other = config | {"mesh": {"fsdp": 8}}
  run.open_workdir(tmp_path, other)
  file = pathlib.Path(tmp_path) / "config.json"
  assert json.loads(file.read_text()) == other
  with pytest.raises(errors.UserError, match=r"optim\.b1=0\.9, not 0\.8"):
    run.open_workdir(tmp_path, other | {"optim": {"b1": 0.8}})
