"""What all commands share: flags, one-line errors, exit codes.

  0  done
  1  the input is at fault: one line on stderr names value, place and remedy
  2  the command line or config is at fault: likewise
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import difflib
import importlib.util
import logging as std_logging
import os
import pathlib
import runpy
import sys
import traceback
from typing import Any

from absl import flags
from absl import logging
import jax

from lora_jax import errors
from lora_jax import processes
from lora_jax.train import workdir as workdir_lib

# Of compiled programs; the ones unused for longest go first.
CACHE_BYTES = 2 * 2**30

# That torch is absent is no news here: nothing needs it.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def run(main: Callable[[], None], argv: list[str] | None = None) -> None:
  """Parses flags, runs `main` and exits with its code."""
  sys.unraisablehook = _unraisable
  # A failed checkpoint leaves tasks nobody waits for; the error was raised.
  std_logging.getLogger("asyncio").setLevel(std_logging.CRITICAL)
  try:
    code = _code(main, sys.argv if argv is None else argv)
  except Exception:
    if not processes.connected():
      raise
    traceback.print_exc()
    code = 1
  if code and processes.connected():
    # At once: a process that ends in order waits for the others, and they
    # may be waiting for its data.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
  sys.exit(code)


def determine() -> None:
  """Asks XLA for the same bits every time, if the config does."""
  config = flags.FLAGS.config if "config" in flags.FLAGS else None
  compute = getattr(config, "compute", None) or {}
  if "reproduce" in flags.FLAGS and flags.FLAGS.reproduce:
    compute = (workdir_lib.read_json(
        pathlib.Path(flags.FLAGS.reproduce) / "config.json") or {}).get(
            "compute", {})
  if compute.get("deterministic", False):
    # Before XLA reads them, which is with the first device.
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_gpu_deterministic_ops=true")


def connect() -> None:
  """Joins the processes that the config names; one of them prints."""
  config = flags.FLAGS.config if "config" in flags.FLAGS else None
  if config is None or "distributed" not in config:
    return
  processes.connect(processes.DistributedConfig(**config.distributed))
  if processes.connected() and not processes.writes():
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)


def cache_compilations() -> None:
  """Keeps compiled programs between runs, in `xla` of the cache folder.

  XLA tunes matrix products on a GPU for a minute or more; on a CPU compiling
  a step takes longer than running it. What jax knows a program by includes
  the processor's features, so that a cache moved to another one is not used,
  but not the number of threads its loops were cut for: that has a folder of
  its own. Environment variables of jax go before all of this; an empty
  JAX_COMPILATION_CACHE_DIR turns it off.
  """
  from third_party import assets

  folder = assets.cache_dir() / "xla"
  if jax.default_backend() == "cpu":
    folder /= f"cpu-{len(os.sched_getaffinity(0))}"
  try:
    folder.mkdir(parents=True, exist_ok=True)
    writable = os.access(folder, os.W_OK)
  except OSError:
    writable = False
  if not writable:
    logging.debug("%s: not writable; compiled programs are not kept", folder)
    return
  values: dict[str, Any] = {
      "jax_compilation_cache_dir": str(folder),
      "jax_persistent_cache_min_compile_time_secs": 0.2}
  if importlib.util.find_spec("filelock"):  # Without, jax cannot bound it.
    values["jax_compilation_cache_max_size"] = CACHE_BYTES
  for name, value in values.items():
    if name.upper() not in os.environ:
      jax.config.update(name, value)


def _unraisable(report) -> None:
  # When a checkpoint fails (and orbax has raised that), TensorStore reports
  # every other write that then finds orbax's event loop gone.
  if str(report.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(report)


def _code(main, argv) -> int:
  logging.use_absl_handler()
  logging.set_verbosity(logging.WARNING)
  try:
    rest = _parse(argv)
    if rest:
      raise errors.UsageError(
          f'"{rest[0]}" is not a flag; write --name=value (see --help)')
    determine()
    connect()
    cache_compilations()
    main()
    return 0
  except errors.UsageError as error:
    return _fail(str(error), 2)
  except errors.UserError as error:
    return _fail(str(error), 1)
  except OSError as error:
    place = f"{error.filename}: " if error.filename else ""
    return _fail(f"{place}{error.strerror or error}; check the path, its "
                 "permissions and the free space", 1)
  except KeyboardInterrupt:
    return _fail("interrupted; the same command goes on from the newest "
                 "checkpoint", 130)


def _fail(message: str, code: int) -> int:
  if sys.stdout.isatty():
    print()  # The progress line has no end of its own.
  print(f"error: {' '.join(message.split())}", file=sys.stderr)
  return code


def _parse(argv: list[str]) -> list[str]:
  if any(a in ("--help", "-help", "-h") for a in argv[1:]):
    module = sys.modules["__main__"]
    print(module.__doc__ or "")
    print(flags.FLAGS.main_module_help())
    sys.exit(0)
  for flag in argv[1:]:
    if flag.startswith("--config="):
      check_config(flag.partition("=")[2], argv)
  try:
    return flags.FLAGS(argv)[1:]
  except flags.Error as error:
    raise errors.UsageError(str(error)) from None


def check_config(path_and_arg: str, argv: list[str]) -> None:
  """Checks a config file and the names of all overrides in `argv`.

  `config_flags` parses and types the values afterwards; here the mistakes
  are caught that it reports without saying where.

  Raises:
    errors.UsageError: names the file or field, and the nearest right one.
  """
  path, _, arg = path_and_arg.partition(":")
  file = pathlib.Path(path)
  if not file.is_file():
    folder = file.parent if file.parent.is_dir() else pathlib.Path("configs")
    known = [str(p) for p in sorted(folder.glob("*.py"))]
    raise errors.UsageError(
        f"--config={path}: no such file{errors.nearest(path, known)}")
  try:
    get_config = runpy.run_path(str(file))["get_config"]
    config = get_config(arg) if arg else get_config()
  except errors.UserError:
    raise
  except Exception as error:
    reason = str(error).splitlines()[0] if str(error) else repr(error)
    raise errors.UsageError(f"--config={path_and_arg}: {reason}") from None
  for flag in argv:
    if flag.startswith("--config."):
      _check_name(config, flag.partition("=")[0][len("--config."):])


def _check_name(config: Mapping[str, Any], dotted: str) -> None:
  node = config
  parts = dotted.split(".")
  for i, part in enumerate(parts):
    if not isinstance(node, Mapping) and not hasattr(node, "keys"):
      raise errors.UsageError(
          f"--config.{dotted}: {'.'.join(parts[:i])} has no fields")
    if part not in node:
      every = list(_names(config))
      here = ".".join(parts[:i + 1])
      last = [n for n in every if n.rpartition(".")[2] == part]
      close = last or difflib.get_close_matches(dotted, every, 1, 0.5)
      hint = f'; did you mean "{close[0]}"?' if close else errors.nearest(
          part, node)
      raise errors.UsageError(f"--config.{dotted}: {here} is unknown{hint}")
    node = node[part]


def _names(config, prefix=""):
  for name in config:
    value = config[name]
    if hasattr(value, "keys") and len(value):
      yield from _names(value, f"{prefix}{name}.")
    else:
      yield f"{prefix}{name}"
