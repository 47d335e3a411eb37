"""Fine-tunes a model as a config says.

  python -m experiments.run --config=configs/quickstart.py
  python -m experiments.run --config=configs/quickstart.py:method=dora \\
      --config.adapter.rank=8 --workdir=runs/dora8

  python -m experiments.run --reproduce=runs/dora8

The same command goes on where a killed run stopped. What a work directory
holds is listed in lora_jax/train/workdir.py.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import hashlib
import json
import pathlib
import sys
from typing import Any

from absl import flags
import jax
from ml_collections import config_flags

from configs import common
from experiments import blocks
from experiments import cli
from experiments import report
from experiments import reproduce
from experiments import rows as rows_lib
from experiments import watched
from lora_jax import api
from lora_jax import errors
from lora_jax import processes
from lora_jax.api import training as training_lib
from lora_jax.train import loop
from lora_jax.train import sinks as sinks_lib
from lora_jax.train import workdir as workdir_lib


def default_workdir(name: str, config: dict[str, Any]) -> pathlib.Path:
  """`runs/<config file>-<digest of the resolved config>`."""
  text = json.dumps(_identity(config), sort_keys=True)
  digest = hashlib.sha256(text.encode()).hexdigest()[:8]
  return pathlib.Path("runs") / f"{name}-{digest}"


def open_workdir(folder: pathlib.Path, config: dict[str, Any]) -> None:
  """Writes config.json and environment.json, after checking an older one.

  Raises:
    errors.UserError: if the folder holds a run of another config, or cannot
      be written.
  """
  path, stored = folder / "config.json", config
  if path.exists():
    try:
      old = json.loads(path.read_text())
    except ValueError:
      old = None  # Not ours, or older than atomic writes: start over.
    if old is not None and _identity(old) != _identity(config):
      name, was, now = next(_differences(_identity(old), _identity(config)))
      raise errors.UserError(
          f"{folder} holds a run with {name}={was!r}, not {now!r}; choose "
          "another --workdir, or delete it")
    if old is not None:  # Later commands take the devices of the last start.
      stored = old | {"mesh": config["mesh"]}
  workdir_lib.write_json(path, stored)
  workdir_lib.write_json(
      folder / "environment.json", workdir_lib.environment(config["seed"]))


def _identity(config: dict[str, Any]) -> dict[str, Any]:
  """What of a config decides the result.

  Not where metrics are shown, and not the devices, nor how a step fits in
  them and their hosts: a run may go on on others. A field that the run's
  version did not have yet has its default.
  """
  defaults = common.get_config().to_dict()
  whole = _filled(config, defaults)
  whole["hybrid"] = {name: _filled(block, defaults["adapter"])
                     for name, block in whole["hybrid"].items()}
  whole["compute"] = {name: value for name, value in whole["compute"].items()
                      if name not in ("remat", "mlp_tiles", "offload")}
  return {name: block for name, block in whole.items()
          if name not in ("log", "mesh", "distributed", "memory")}


def _filled(config: Any, defaults: Any) -> Any:
  if not isinstance(config, dict) or not isinstance(defaults, dict):
    return config
  return defaults | {
      name: _filled(value, defaults.get(name))
      for name, value in config.items()}


def _differences(old, new, prefix=""):
  for key in sorted({*old, *new}):
    a, b = old.get(key), new.get(key)
    if isinstance(a, dict) and isinstance(b, dict):
      yield from _differences(a, b, f"{prefix}{key}.")
    elif a != b:
      yield f"{prefix}{key}", a, b


def execute(config: dict[str, Any], folder: pathlib.Path) -> dict[str, Any]:
  """Runs a resolved config in a work directory; returns the summary.

  Of several processes the one that writes has a summary.
  """
  blocks.check(config)
  open_workdir(folder, config)
  print(f"work directory: {folder}")
  precision = "highest" if config["compute"]["dtype"] == "float32" else None
  with (jax.default_matmul_precision(precision),
        sinks_lib.Sinks(blocks.log(config), config) as sinks):
    found = _execute(config, folder, sinks)
    sinks.finish(found)
    return found


def _execute(config, folder, sinks):
  model = blocks.load(config, trains=True)
  data = rows_lib.datasets(model, config)
  ready = prepare(config, folder, sinks, model, data, donate=True)
  return ready.finish(*ready.training.fit())


@dataclasses.dataclass(frozen=True)
class Ready:
  """A run that has not begun.

  Attributes:
    training: it.
    finish: `(model, outcome, together=1) -> summary`; what is left to do after
      it, of so many side by side. Of several processes the one that writes
      has a summary.
  """

  training: training_lib.Training
  finish: Callable[..., dict[str, Any]]


def prepare(
    config: dict[str, Any], folder: pathlib.Path, sinks: sinks_lib.Sinks,
    model: api.Model, data: rows_lib.Data, donate: bool = False,
) -> Ready:
  """A run of a config whose base is loaded.

  Args:
    config: resolved.
    folder: its work directory.
    sinks: where metrics go beside it.
    model: from `blocks.load`.
    data: from `rows.datasets`.
    donate: whether nobody else needs the model's base.
  """
  rows, held_out, examples = data
  workdir_lib.write_json(folder / "inputs.json", reproduce.inputs(
      model.fingerprint, rows, held_out))
  if config["adapter"]["init_from"]:
    model = model.with_adapter(
        config["adapter"]["init_from"], dropout=config["adapter"]["dropout"])
    found = [part.config for part in model.parts.values()] or [
        model.adapter_config]
    print("adapter: " + ", ".join(
        f"{one.method} r={one.rank} alpha={one.alpha:g}" for one in found)
        + f" of {config['adapter']['init_from']}; of the config's adapter "
        "block only dropout counts")
  else:
    model = _adapted(model, rows, config, folder, donate)
  watch = watched.begin(model, config, folder)
  asked = rows_lib.prompts(
      model, examples, config["data"]["system"], config["train"]["samples"])

  def sample(trained):
    answers = trained.generate(
        [tokens for tokens, _, _ in asked],
        max_new_tokens=config["train"]["sample_tokens"])
    return [model.tokenizer.decode(a, skip_special_tokens=True)
            for a in answers]

  def save(trained, step=None):
    if trained.adapter_config.method == "full":
      trained.save_merged(folder / "model")
    elif trained.adapter_config.method != "none":
      trained.save(folder / "adapter")

  def finished(trained, outcome, together=1):
    if held_out is None:
      save(trained)
    seen = watch(trained)
    if not processes.writes():
      return {}
    return finish(
        trained, outcome, folder, [a[1:] for a in asked],
        {"together": together} | seen)

  return Ready(training_lib.prepare(
      model, rows, held_out, workdir=folder, config=blocks.train(config),
      optim=blocks.optim(config), max_length=config["data"]["max_length"],
      packing=config["data"]["packing"], remat=config["compute"]["remat"],
      precision=blocks.precision(config), memory=blocks.memory(config),
      seed=config["seed"], sample=sample if asked else None, save_best=save,
      sinks=sinks, donate=donate), finished)


def _adapted(model, rows, config, folder, donate):
  """The model with fresh adapters.

  What a start makes of rows is written down before the first step: a run that
  goes on reads it, and starts from the same bits.
  """
  block, start = blocks.adapter(config), folder / "start"
  if start.is_dir():
    return model.with_adapter(start, donate=donate)
  adapted = model.adapt(
      blocks.adapters_of(config), rows=rows,
      batch_size=config["train"]["batch_size"], seed=config["seed"],
      donate=donate)
  if block.start().informed is not None:
    print(f"adapter: init={block.init} looked at up to {block.init_batches} "
          f"batches of rows; see {start}")
    adapted.save(start)
  return adapted


def finish(
    model: api.Model, outcome: loop.Outcome, folder: pathlib.Path,
    prompts: list[tuple[str, str]], more: dict[str, Any]
) -> dict[str, Any]:
  """Writes and prints the result; `more`: further fields of the summary."""
  found = report.summary(model, outcome, folder) | more
  workdir_lib.write_json(folder / "summary.json", found)
  workdir_lib.write_bytes(
      folder / "samples.md",
      report.samples(prompts, outcome.progress.samples).encode())
  report.plot(folder)
  if "eval_loss_change" in found:
    low, high = found["eval_loss_change_95"]
    print(f"held-out loss {found['initial_eval_loss']:.4f} -> "
          f"{found['final_eval_loss']:.4f} nats a token: "
          f"{found['eval_loss_change']:+.4f}, 95% interval [{low:+.4f}, "
          f"{high:+.4f}] over {found['eval_rows']} rows; perplexity "
          f"{found['perplexity']:.2f}")
  if "watched_change" in found:
    low, high = found["watched_change_95"]
    print(f"watched rows {found['watched_before']:.4f} -> "
          f"{found['watched_after']:.4f} nats a token: "
          f"{found['watched_change']:+.4f} [{low:+.4f}, {high:+.4f}]")
  if "advice" in found:
    print(found["advice"])
  if found["peak_device_bytes"]:
    predicted = found["step_device_bytes"]
    print(f"peak memory of the device "
          f"{found['peak_device_bytes'] / 2**30:.2f} GiB" + (
              f"; of a step {predicted / 2**30:.2f} predicted"
              if predicted else ""))
  parts = ", ".join(f"{name} {size:,}" for name, size in found.get(
      "trainable_by_part", {}).items())
  print(f"{found['trainable_parameters']:,} of {found['total_parameters']:,} "
        f"parameters trained{parts and f' ({parts})'}; "
        f"{found['wall_seconds']:.0f} s, peak memory "
        f"{found['peak_host_bytes'] / 2**30:.2f} GiB; see {folder}")
  return found


def define_flags() -> None:
  """Those of this command; others import this module for what it does."""
  config_flags.DEFINE_config_file(
      "config", help_string="A file of configs/, with :arg behind it or not.")
  flags.DEFINE_string(
      "workdir", None, "Where the run writes; a folder under runs/ by default.")
  flags.DEFINE_string(
      "reproduce", None, "A work directory to run again, and compare with.")


def replay(old: pathlib.Path, folder: pathlib.Path) -> None:
  """Runs a work directory's config again in another, and compares.

  Raises:
    errors.UserError: if it did not come to the same.
  """
  execute(reproduce.start(old), folder)
  found = reproduce.compare(old, folder)
  if not found.same:
    raise errors.UserError(found.text)
  print(found.text)


def main() -> None:
  if flags.FLAGS.reproduce:
    old = pathlib.Path(flags.FLAGS.reproduce)
    replay(old, pathlib.Path(
        flags.FLAGS.workdir or f"{old}-reproduced"))
    return
  config = flags.FLAGS.config
  if config is None:
    raise errors.UsageError(
        "--config is missing; e.g. --config=configs/quickstart.py")
  resolved = json.loads(config.to_json_best_effort())
  # Which process this is belongs to no result.
  resolved.pop("distributed", None)
  name = next((a.partition("=")[2] for a in sys.argv
               if a.startswith("--config=")), "run")
  name = pathlib.Path(name.partition(":")[0]).stem
  folder = (pathlib.Path(flags.FLAGS.workdir) if flags.FLAGS.workdir
            else default_workdir(name, resolved))
  execute(resolved, folder)


if __name__ == "__main__":
  define_flags()
  cli.run(main)
