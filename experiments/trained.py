"""The model that a command works on: a run's, or one named by its parts."""

from __future__ import annotations

from collections.abc import Sequence
import json
import pathlib
from typing import Any

from absl import flags

from experiments import blocks
from lora_jax import api
from lora_jax import errors
from lora_jax import quant
from lora_jax.data import places
from lora_jax.train import precision

# What is defined here counts as the command's own in its --help.
flags.disclaim_key_flags()

DTYPES = precision.COMPUTE


def define_flags(values: flags.FlagValues) -> None:
  """Adds `--workdir`, `--model`, `--adapter` and `--quant`."""
  own: dict[str, Any] = {"flag_values": values}
  flags.DEFINE_string(
      "workdir", None, "A run of experiments.run: its model and adapter.",
      **own)
  flags.DEFINE_string(
      "model", None, "A Hugging Face folder, a .gguf file, a hub name, a "
      "folder of experiments.quantize, or asset:<name>.", **own)
  flags.DEFINE_string(
      "adapter", None, "A PEFT folder for --model.", **own)
  flags.DEFINE_string(
      "quant", "none", f"How --model is quantised: none, "
      f"{', '.join(quant.FORMATS)}.", **own)


def from_flags(
    values: flags.FlagValues, dtype: str | None = None) -> api.Model:
  """The model that the flags name.

  Args:
    values: with the flags of `define_flags`.
    dtype: compute type; by default the run's, or float32.

  Raises:
    errors.UsageError: if they name none, or two.
    errors.UserError: if it cannot be loaded.
  """
  folder = values.workdir
  if folder and values.model:
    raise errors.UsageError(
        f"--workdir={folder} and --model={values.model} name two models; "
        "give one of them")
  if folder:
    for name in ("adapter", "quant"):
      if values[name].present:
        raise errors.UsageError(
            f"--{name} belongs to --model; --workdir={folder} has its own")
    return from_workdir(folder, dtype)
  if not values.model:
    raise errors.UsageError(
        "--workdir or --model is missing; e.g. "
        "--model=HuggingFaceTB/SmolLM2-135M-Instruct")
  return from_parts(
      values.model, values.adapter, values.quant, dtype or "float32")


def from_parts(
    model: str, adapter: str | None, form: str, dtype: str) -> api.Model:
  """A model by its path, perhaps quantised, perhaps with an adapter."""
  spec = quant.QuantSpec(format=form)
  quant.check(spec)
  loaded = api.load(blocks.locate(model), quant=spec, dtype=dtype)
  return loaded.with_adapter(adapter) if adapter else loaded


def from_workdir(folder: str, dtype: str | None = None) -> api.Model:
  """The best model of a run, loaded as it was trained.

  That is the base and `adapter/`, or, after full fine-tuning, `model/`.

  Raises:
    errors.UserError: if the folder holds no run, or one that has saved
      nothing yet.
  """
  path = pathlib.Path(folder)
  config = _config(path)
  dtype = dtype or config["compute"]["dtype"]
  method = config["adapter"]["method"]
  if method == "full" and not config["adapter"]["init_from"]:
    _exists(path / "model", path)
    return api.load(str(path / "model"), dtype=dtype,
                    chat_template=blocks.chat_template(config))
  if method != "none":
    _exists(path / "adapter", path)
  model = blocks.load(config, dtype)
  return model if method == "none" else model.with_adapter(path / "adapter")


def _config(path: pathlib.Path) -> dict[str, Any]:
  file = path / "config.json"
  try:
    config = json.loads(file.read_text())
    for block in ("model", "quant", "adapter", "compute", "mesh"):
      config[block].keys()
    return config
  except FileNotFoundError:
    hint = "" if path.exists() else places.nearest_sibling(path)
    raise errors.UserError(
        f"--workdir={path}: {file} does not exist{hint}; give the folder that "
        "experiments.run printed") from None
  except (ValueError, KeyError, AttributeError, TypeError):
    raise errors.UserError(
        f"{file} is not the config of a run; give the folder that "
        "experiments.run printed") from None


def _exists(saved: pathlib.Path, path: pathlib.Path) -> None:
  if not saved.exists():
    raise errors.UserError(
        f"{saved} does not exist: the run in {path} has saved no model yet; "
        "run the same experiments.run command again to finish it")


def positive(**values: int) -> None:
  """Raises `errors.UsageError` for the first flag that is below 1."""
  for name, value in values.items():
    if value < 1:
      raise errors.UsageError(
          f"--{name}={value} is out of range; use 1 or more")


def choose(name: str, value: str | None, known: Sequence[str]) -> None:
  """Raises `errors.UsageError` unless a flag's value is one of `known`."""
  if value is None:
    raise errors.UsageError(
        f"--{name} is missing; known: {', '.join(known)}")
  errors.choose(f"--{name}", value, dict.fromkeys(known))
