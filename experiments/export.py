"""Writes the model of a run in a format that other programs read.

  python -m experiments.export --workdir=runs/quickstart-1a2b3c4d \\
      --format=peft --output=my-adapter
  python -m experiments.export --workdir=... --format=hf --output=my-model \\
      --dtype=bfloat16

  peft  the adapter, for Hugging Face PEFT and what reads its folders; of a run
        whose adapter.init changed the base (pissa, loftq ...) the difference
        from its start, for the original base (exact if quant.format=none)
  hf    the whole model, the adapter merged onto the dequantised base; of
        several methods those that can be, the others in its folder adapter/
"""

from __future__ import annotations

import pathlib
from typing import Any

from absl import flags

from experiments import cli
from experiments import trained
from lora_jax import errors
from lora_jax import quant
from lora_jax.api import parts
from lora_jax.export import hf as hf_export

FORMATS = ("peft", "hf")


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
  """Adds this command's flags."""
  own: dict[str, Any] = {"flag_values": values}
  trained.define_flags(values)
  flags.DEFINE_string("format", None, "peft, hf", **own)
  flags.DEFINE_string("output", None, "The folder to write.", **own)
  flags.DEFINE_string(
      "dtype", None, "Of the weights of --format=hf: float32 (the default), "
      "bfloat16, float16.", **own)


def check_output(
    output: str | None, flag: str = "--output") -> pathlib.Path:
  """The folder to write, which must not hold anything yet.

  Raises:
    errors.UsageError: if it is not given.
    errors.UserError: if something is there.
  """
  if not output:
    raise errors.UsageError(f"{flag} is missing; name a folder to write")
  folder = pathlib.Path(output)
  if folder.is_dir() and any(folder.iterdir()):
    raise errors.UserError(
        f"{flag}={output} is not empty; delete it, or name another folder")
  if folder.exists() and not folder.is_dir():
    raise errors.UserError(
        f"{flag}={output} is a file; name a folder to write")
  return folder


def main(values: flags.FlagValues = flags.FLAGS) -> None:
  trained.choose("format", values.format, FORMATS)
  if values.dtype is not None:
    trained.choose("dtype", values.dtype, tuple(hf_export.DTYPES))
    if values.format == "peft":
      raise errors.UsageError(
          f"--dtype={values.dtype} belongs to --format=hf; an adapter is "
          "written in float32, as it was trained")
  folder = check_output(values.output)
  model = trained.from_flags(values)
  if values.format == "hf":
    model.save_merged(
        folder, values.dtype or "float32", model.mergeable or None)
    left = [name for name in model.parts if name not in model.mergeable]
    if left:
      rest = folder / parts.REST
      print(f"note: {', '.join(left)} cannot be merged; it is an adapter of "
            f"the merged model now: --model={folder} --adapter={rest}")
  elif not (model.adapters.layers or model.adapters.outer):
    raise errors.UserError(
        "--format=peft: this model has no adapter (its method trains the "
        "weights, or nothing); use --format=hf")
  else:
    model.save(folder, difference=True)
    if model.replaced is not None and quant.bits_per_parameter(model.base) > 0:
      print("note: the adapter is now one of the original weights, and differs "
            "from what was trained by the quantisation error of what its start "
            "left in the base; --format=hf is exact")
  size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
  print(f"{folder}: {size / 1e6:,.1f} MB ({values.format})")


if __name__ == "__main__":
  define_flags()
  cli.run(main)
