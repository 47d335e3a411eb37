"""Converts a model once, so that later starts only read the result.

  python -m experiments.quantize --model=PATH --format=nf4
  python -m experiments.quantize --model=PATH --format=nf4 --out=FOLDER
  python -m experiments.quantize --list
  python -m experiments.quantize --clear

Without --out the base goes into the cache folder, where commands with the
same model and the same quantisation find it. A base of --out is a model of
its own, with config and tokenizer: FOLDER may be moved to another machine and
given as `model.path`, the original is not needed.
"""

from __future__ import annotations

import json
import math
import pathlib
import time
from typing import Any

from absl import flags

from experiments import blocks
from experiments import cli
from experiments import export
from experiments import trained
from lora_jax import api
from lora_jax import errors
from lora_jax import quant
from lora_jax.data import tokenizer as tokenizer_lib
from lora_jax.models import base_cache
from lora_jax.models import base_store
from lora_jax.models import hf
from lora_jax.models import load as load_lib


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
  """Adds this command's flags."""
  own: dict[str, Any] = {"flag_values": values}
  spec = quant.QuantSpec()
  flags.DEFINE_string(
      "model", None, "A Hugging Face folder, a .gguf file, a hub name, or "
      "asset:<name>.", **own)
  flags.DEFINE_string(
      "format", spec.format, f"none, {', '.join(quant.FORMATS)}.", **own)
  flags.DEFINE_integer(
      "block_size", spec.block_size, "Rows of a block.", **own)
  flags.DEFINE_boolean(
      "double", spec.double, "Statistics of the blocks in 8 bits.", **own)
  flags.DEFINE_string(
      "skip", ",".join(load_lib.SKIP), "Targets not to quantise.", **own)
  flags.DEFINE_string(
      "dtype", "float32",
      f"Type of what is not quantised: {', '.join(trained.DTYPES)}.", **own)
  flags.DEFINE_string(
      "out", None, "The folder to write; the cache by default.", **own)
  flags.DEFINE_boolean("list", False, "Print what the cache holds.", **own)
  flags.DEFINE_boolean("clear", False, "Remove what it holds.", **own)


def show(root: pathlib.Path) -> None:
  """Prints the bases of a cache, the latest used last."""
  found = base_cache.entries(root)
  for stored in found:
    print(f"{stored.path}\n  {stored.manifest['source']}: {stored.recipe}, "
          f"{stored.manifest['bytes'] / 1e6:,.1f} MB")
  total = sum(stored.manifest["bytes"] for stored in found)
  print(f"{root}: {len(found)} bases, {total / 1e6:,.1f} MB")


def save(
    loaded: load_lib.LoadedBase, recipe: base_store.Recipe,
    folder: pathlib.Path) -> None:
  """Writes a base that is a model of its own, whole or not at all.

  Raises:
    errors.UserError: if it cannot be written, or has no tokenizer.
  """
  tokenizer = tokenizer_lib.load(loaded.source)
  with base_store.fresh(folder.absolute().parent) as scratch:
    tokenizer.save_pretrained(scratch)
    (scratch / "config.json").write_text(
        json.dumps(loaded.config.to_hf(), indent=2) + "\n")
    base_store.write(
        scratch, loaded.config, loaded.base, recipe, loaded.fingerprint,
        source=loaded.source)
    scratch.rename(folder)


def _convert(values: flags.FlagValues) -> None:
  if not values.model:
    raise errors.UsageError(
        "--model is missing; e.g. "
        "--model=HuggingFaceTB/SmolLM2-135M-Instruct")
  trained.choose("dtype", values.dtype, trained.DTYPES)
  block = {"format": values.format, "block_size": values.block_size,
           "double": values.double, "skip": values.skip}
  spec, skip = blocks.quant({"quant": block}), blocks.skip({"quant": block})
  recipe = base_store.Recipe.of(spec, values.dtype, skip)
  folder = export.check_output(values.out, "--out") if values.out else None
  source = load_lib.open_source(blocks.locate(values.model))
  if isinstance(source, base_store.Stored):
    raise errors.UserError(
        f"--model={values.model} is converted already; give the original")
  start = time.perf_counter()
  how = (source, spec, values.dtype, skip)
  if folder is None:
    stored = base_cache.keep(*how, root=api.base_folder())
  else:
    save(load_lib.convert(*how), recipe, folder)
    stored = base_store.Stored.open(folder)
  _report(stored, time.perf_counter() - start)


def _report(stored: base_store.Stored, seconds: float) -> None:
  size, writing = stored.manifest["bytes"], stored.manifest["write_seconds"]
  count = sum(map(math.prod, hf.names(stored.config).values()))
  print(f"{size / 1e6:,.1f} MB, {8 * size / count:.3f} bits for each of "
        f"{count:,} parameters ({stored.recipe})\n{seconds:.1f} s, written at "
        f"{size / 1e6 / writing:,.0f} MB/s\n{stored.path}")


def main(values: flags.FlagValues = flags.FLAGS) -> None:
  if values.list or values.clear:
    root = api.base_folder()
    if values.list:
      show(root)
    if values.clear:
      print(f"{root}: removed {base_cache.clear(root) / 1e6:,.1f} MB")
    return
  _convert(values)


if __name__ == "__main__":
  define_flags()
  cli.run(main)
