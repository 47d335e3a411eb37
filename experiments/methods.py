"""Prints the table of all PEFT methods, and keeps docs/METHODS.md in step.

  python -m experiments.methods                        # print it
  python -m experiments.methods --output=docs/METHODS.md
  python -m experiments.methods --check=docs/METHODS.md  # exit code 1 if stale

It is made from the registry and the methods' own text; parameters are counted
at r=16 (methods without ranks: at their defaults) on the places that a method
adapts by default.
"""

from __future__ import annotations

import pathlib
import sys

from absl import flags

from experiments import cli
from experiments.bench import geometry
from lora_jax import errors
from lora_jax.adapters import assemble
from lora_jax.adapters import config as config_lib
from lora_jax.adapters import method as method_lib
from lora_jax.adapters import registry
from lora_jax.models import config as model_lib
from lora_jax.models import modules

RANK = 16
MODELS = {"SmolLM2-135M": "smollm2-135m", "Llama-2-7B": "llama2-7b"}
HEADER = f"""# Methods

Made by `python -m experiments.methods --output=docs/METHODS.md` from the
registry (lora_jax/adapters/registry.py); do not edit it. How one is added:
docs/ADD_A_METHOD.md. W0 is `[i, o]`, h = x W0.

Parameters are those trained at r={RANK}, or at the method's defaults where it
has no rank, on the places it adapts by default. *Merged*: whether the adapter
becomes part of the weights. *PEFT*: the `peft_type` of the folders that are
read and written; a dash is a method that Hugging Face PEFT does not have,
whose folders have the same layout and a config of their own. *vLLM*: whether
vLLM serves such a folder.
"""


def parameters(name: str, model: model_lib.ModelConfig) -> int | None:
  """Trainable parameters of a method at `RANK`, or None.

  Args:
    name: a key of the registry.
    model: the architecture.
  """
  row = registry.method(name)
  if row.adapter is None or not row.count:
    return None
  config = registry.checked(config_lib.AdapterConfig(method=name, rank=RANK))
  shapes, sizes = modules.shapes(model), modules.geometry(model)
  ranks = [(target, int(rank)) for target, placed in assemble.place(
      config, modules.paths(model)).items() for rank in placed.rank if rank]
  return registry.shared_count(
      row, config.options, RANK, sizes, len(ranks)) + sum(
          registry.count(
              row, config.options, target, shapes[target], rank, sizes)
          for target, rank in ranks)


def _line(name: str, row: method_lib.Method) -> str:
  counts = []
  for geometry_name in MODELS.values():
    found = parameters(name, geometry.geometry(geometry_name))
    counts.append("" if found is None else f"{found:,}")
  equation = row.summary.replace("|", "\\|")
  kind = row.form.peft_type if row.form else ("-" if row.adapter else "")
  flags_ = ("yes" if row.mergeable else "no", "yes" if row.vllm else "no")
  merged, vllm = flags_ if row.adapter else ("", "")
  return (f"| `{name}` | {equation} | {row.paper} | {counts[0]} | {counts[1]} "
          f"| {merged} | {kind} | {vllm} |")


def table() -> str:
  """The page, as Markdown."""
  titles = ["method", "what it computes", "paper", *MODELS, "merged", "PEFT",
            "vLLM"]
  lines = [
      "| " + " | ".join(titles) + " |",
      "|" + "---|" * len(titles),
      *(_line(name, row) for name, row in registry.METHODS.items()
        if row.adapter)]
  return f"{HEADER}\n" + "\n".join(lines) + "\n"


def main() -> None:
  text = table()
  if flags.FLAGS.check:
    path = pathlib.Path(flags.FLAGS.check)
    if not path.exists() or path.read_text() != text:
      raise errors.UserError(
          f"{path} is not what the registry says; run python -m "
          f"experiments.methods --output={path}")
  elif flags.FLAGS.output:
    pathlib.Path(flags.FLAGS.output).write_text(text)
  else:
    sys.stdout.write(text)


if __name__ == "__main__":
  flags.DEFINE_string("output", None, "The file to write.")
  flags.DEFINE_string("check", None, "A file that must be what is printed.")
  cli.run(main)
