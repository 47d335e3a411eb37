"""Commands as processes of their own, without their import time.

A server imports what `experiments.run` imports and then waits; every command
is a fork of it, with its own flags, JAX backend, output files and exit code.
Nothing of JAX has been initialised when it forks.
"""

from __future__ import annotations

import atexit
import importlib
import itertools
import json
import os
import subprocess
import sys
import time
import traceback


class Server:
  """Starts commands; see `Process`."""

  def __init__(self, root):
    self._process = subprocess.Popen(
        [sys.executable, "-m", "tests.experiments.forks"], cwd=root,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {
            "PYTHONPATH": str(root),
            # Runs of a test compile the same small programs again and again.
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"})

  def ask(self, **request):
    self._process.stdin.write(json.dumps(request) + "\n")
    self._process.stdin.flush()
    return json.loads(self._process.stdout.readline())

  def start(self, argv, cwd, out, err, limit=None, die=None) -> Process:
    """Forks.

    Args:
      argv: flags.
      cwd: working directory.
      out: file of stdout.
      err: file of stderr.
      limit: the largest file it may write, in bytes.
      die: `"module:attribute:n"`, kill -9 instead of the n-th call of it.
    """
    return Process(self, self.ask(
        argv=argv, cwd=str(cwd), out=str(out), err=str(err), limit=limit,
        die=die))

  def close(self):
    self._process.stdin.close()
    self._process.wait(timeout=60)


class Process:
  """The part of `subprocess.Popen` that the tests use."""

  def __init__(self, server, pid):
    self._server, self.pid = server, pid
    self._code = None

  def poll(self) -> int | None:
    if self._code is None:
      self._code = self._server.ask(poll=self.pid)
    return self._code

  def wait(self, timeout: float) -> int:
    deadline = time.monotonic() + timeout
    while self.poll() is None:
      if time.monotonic() > deadline:
        self.kill()
        raise TimeoutError(f"no end after {timeout} s")
      time.sleep(0.01)
    return self.poll()

  def kill(self):
    if self.poll() is None:
      os.kill(self.pid, 9)


def _serve(main):
  for line in sys.stdin:
    request = json.loads(line)
    if "poll" in request:
      pid, status = os.waitpid(request["poll"], os.WNOHANG)
      reply = os.waitstatus_to_exitcode(status) if pid else None
    else:
      reply = os.fork()
      if not reply:
        _become(request)
        _exit_from(main)
    print(json.dumps(reply), flush=True)


def _become(request):
  import resource
  import signal

  os.chdir(request["cwd"])
  flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
  for name, number in (("out", 1), ("err", 2)):
    os.dup2(os.open(request[name], flags), number)
  os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
  if request["limit"] is not None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"],) * 2)
    # Which warns of every program that it cannot keep, in a file so small.
    import jax

    jax.config.update("jax_enable_compilation_cache", False)
  if request["die"]:
    _kill_at(*request["die"].split(":"))
  sys.argv = ["experiments/run.py", *request["argv"]]


def _exit_from(main):
  """Ends as the interpreter does, but leaves its many objects alone."""
  code = 1
  try:
    main()
  except SystemExit as end:
    code = end.code or 0
  except BaseException:
    traceback.print_exc()
  atexit._run_exitfuncs()
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def _kill_at(module, attribute, number):
  *parents, name = attribute.split(".")
  owner = importlib.import_module(module)
  for parent in parents:
    owner = getattr(owner, parent)
  original, calls = getattr(owner, name), itertools.count(1)

  def dying(*args, **kwargs):
    if next(calls) == int(number):
      os.kill(os.getpid(), 9)
    return original(*args, **kwargs)

  setattr(owner, name, dying)


def _main():
  # What a run imports late, beside its own modules.
  import jinja2.sandbox  # noqa: F401
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot  # noqa: F401
  import transformers

  from experiments import cli
  from experiments import run

  transformers.AutoTokenizer  # noqa: B018 (imported when it is looked up)
  transformers.PreTrainedTokenizerFast  # noqa: B018
  transformers.LlamaConfig  # noqa: B018
  run.define_flags()
  _serve(lambda: cli.run(run.main))


if __name__ == "__main__":
  _main()
