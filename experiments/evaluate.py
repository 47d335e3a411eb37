"""Losses of every row of a file under a model.

  python -m experiments.evaluate --model=PATH --adapter=PEFT_FOLDER \\
      --quant=nf4 --data=FILE.jsonl --output=OUT.jsonl

One line of OUT.jsonl for each row of FILE.jsonl, in its order:

  {"tokens": 17, "nll": 31.4}

`tokens` counts the predicted tokens, `nll` is the sum of their negative log
likelihoods in nats. Of {"text": ...} that is every token but the first, of
{"messages": ...} and {"prompt": ..., "completion": ...} the completion.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator
import json
import os
import pathlib
from typing import Any

from absl import flags
import jax
import numpy as np

from experiments import cli
from experiments import trained
from lora_jax import api
from lora_jax import errors
from lora_jax import mesh as mesh_lib
from lora_jax import types
from lora_jax.data import dataset as dataset_lib
from lora_jax.data import pipeline
from lora_jax.data import sources
from lora_jax.data import templates
from lora_jax.evaluate import perplexity
from lora_jax.train import workdir as workdir_lib


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
  """Adds this command's flags."""
  own: dict[str, Any] = {"flag_values": values}
  trained.define_flags(values)
  flags.DEFINE_string("data", None, "A file or folder of rows.", **own)
  flags.DEFINE_string(
      "format", "mixed", "Of the rows; see data.format. The default looks at "
      "every row.", **own)
  flags.DEFINE_string("output", None, "The .jsonl file to write.", **own)
  flags.DEFINE_string(
      "dtype", "float32", "Compute type: float32, bfloat16, float16.", **own)
  flags.DEFINE_integer(
      "batch_tokens", 2048, "Tokens of a batch, padding included; it bounds "
      "the memory. A longer row is a batch of its own.", **own)


def bucket(n: int) -> int:
  """The least of 32, 48, 64, 96, 128, 192, ... that is at least n."""
  size = 32
  while size < n:
    size *= 2
  return size * 3 // 4 if size > 32 and n <= size * 3 // 4 else size


def batches(
    rows: dataset_lib.Dataset, batch_tokens: int, ways: int = 1
) -> Iterator[tuple[types.Batch, np.ndarray]]:
  """Every row once, with rows of like length; few shapes, bounded size.

  Args:
    rows: to be batched.
    batch_tokens: b * t of a batch, unless b is the least possible.
    ways: b is a multiple of it.

  Yields:
    A batch `[b, t]`, and the positions in `rows` of its first rows.
  """
  groups = collections.defaultdict(list)
  for i, length in enumerate(rows.lengths.tolist()):
    groups[bucket(length)].append(i)
  for length, members in sorted(groups.items()):
    chosen = np.asarray(members)
    size = min(max(batch_tokens // length, 1), len(members))
    size = -(-size // ways) * ways
    for batch, indices in pipeline.eval_batches(
        rows.select(chosen), size, multiple=length):
      yield batch, chosen[indices]


def encode(
    model: api.Model, path: str, form: str) -> dataset_lib.Dataset:
  """The rows of a file.

  Raises:
    errors.UserError: if one is malformed, or longer than the model's context.
  """
  encoded = [templates.encode(example, model.tokenizer)
             for example in sources.read(path, form)]
  limit = model.config.max_position
  for row in encoded:
    if len(row.tokens) > limit:
      raise errors.UserError(
          f"{row.source}: the row has {len(row.tokens)} tokens, and the "
          f"model's context (max_position) is {limit}; split it")
  return dataset_lib.of(encoded)


def row_losses(
    model: api.Model, rows: dataset_lib.Dataset, batch_tokens: int
) -> perplexity.RowLosses:
  """Losses of all rows, in their order.

  Raises:
    errors.UserError: if no row has a token to predict.
  """
  found = model.row_losses(
      batches(rows, batch_tokens, mesh_lib.ways(model.mesh)))
  if not found.weight.sum():
    raise errors.UserError(
        "--data: no row has a token to predict; a text of one token has none")
  return found


def check_output(output: str | None) -> pathlib.Path:
  """The file to write; told before the work that it cannot be.

  Raises:
    errors.UsageError: if it is not given.
    errors.UserError: if its folder cannot be written.
  """
  if not output:
    raise errors.UsageError("--output is missing; name a .jsonl file to write")
  path = pathlib.Path(output)
  if path.is_dir():
    raise errors.UserError(f"--output={output} is a folder; name a file")
  folder = path.parent
  while not folder.exists():
    folder = folder.parent
  if not folder.is_dir() or not os.access(folder, os.W_OK):
    raise errors.UserError(
        f"--output={output}: {folder} cannot be written to; mend its "
        "permissions, or name a file elsewhere")
  return path


def main(values: flags.FlagValues = flags.FLAGS) -> None:
  if not values.data:
    raise errors.UsageError("--data is missing; name a .jsonl file of rows")
  trained.choose("dtype", values.dtype, trained.DTYPES)
  trained.positive(batch_tokens=values.batch_tokens)
  output = check_output(values.output)
  model = trained.from_flags(values, values.dtype)
  rows = encode(model, values.data, values.format)
  precision = "highest" if model.dtype == "float32" else None
  with jax.default_matmul_precision(precision):
    found = row_losses(model, rows, values.batch_tokens)
  lines = [json.dumps({"tokens": round(weight), "nll": nll}) + "\n"
           for nll, weight in zip(found.nll.tolist(), found.weight.tolist())]
  workdir_lib.write_bytes(output, "".join(lines).encode())
  print(f"rows {len(lines)}  tokens {round(found.weight.sum())}  "
        f"nll {found.nll.sum():.4f}  loss {found.loss:.6f}  "
        f"perplexity {found.perplexity:.4f}")


if __name__ == "__main__":
  define_flags()
  cli.run(main)
