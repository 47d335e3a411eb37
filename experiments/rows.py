"""The rows of an experiment: to train on, held out, and to answer."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from typing import Any

from experiments import blocks
from lora_jax import api
from lora_jax import errors
from lora_jax.data import dataset as dataset_lib
from lora_jax.data import formats
from lora_jax.data import sources
from lora_jax.data import templates

# Rows to train on, rows held out, and the held-out examples.
Data = tuple[
    dataset_lib.Dataset, dataset_lib.Dataset | None, list[formats.Example]]
# Fields of the data block that `encoded` reads.
READ = ("path", "format", "split", "rows", "unique", "system")


@dataclasses.dataclass(frozen=True)
class Encoded:
  """All rows of `data.path`.

  Attributes:
    rows: their tokens.
    examples: as they were read, one a row.
    doubles: how many equal to earlier ones were left out; None if nobody
      looked.
  """

  rows: dataset_lib.Dataset
  examples: list[formats.Example]
  doubles: int | None


def encoded(model: api.Model, config: dict[str, Any]) -> Encoded:
  """Reads and tokenises `data.path`; of equal rows `data.unique` keeps one."""
  block = config["data"]
  examples = sources.read(
      blocks.locate(block["path"]), block["format"], block["split"])
  examples = examples[:block["rows"] or None]
  rows = _encode(model, examples, block)
  if not block.get("unique", False):  # Runs of earlier versions: without it.
    return Encoded(rows, examples, None)
  kept = dataset_lib.unique(rows)
  return Encoded(kept, [examples[i] for i in kept.ids], len(rows) - len(kept))


def _encode(model, examples, block):
  return model.encode(
      examples, max_length=2**30, system=block["system"] or None)


def datasets(
    model: api.Model, config: dict[str, Any], known: Encoded | None = None
) -> Data:
  """Rows to train on, rows held out, and the held-out examples.

  Held-out rows are drawn from those of at most `data.eval_max_length`
  tokens; all others are trained on. With `data.unique` none is on both sides.
  What is held out does not depend on `data.train_rows`.

  Args:
    model: its tokenizer.
    config: resolved.
    known: `encoded` of a config with the same tokenizer and READ fields.
  """
  block = config["data"]
  known = known or encoded(model, config)
  rows, examples = known.rows, known.examples
  if block["eval_path"]:
    others = sources.read(blocks.locate(block["eval_path"]), block["format"])
    held = _encode(model, others, block)
    chosen = (held.lengths <= block["eval_max_length"]).nonzero()[0]
    chosen = chosen[:block["eval_rows"] or None]
    train_rows, held_rows = rows, held.select(chosen)
  elif block["eval_rows"]:
    fits = (rows.lengths <= block["eval_max_length"]).nonzero()[0]
    if not block["eval_rows"] < len(rows) or len(fits) < block["eval_rows"]:
      raise errors.UsageError(
          f"data.eval_rows={block['eval_rows']}, but {block['path']} has "
          f"{len(rows)} rows, {len(fits)} of them of at most data.eval_max_"
          f"length={block['eval_max_length']} tokens; lower it")
    # Runs of earlier versions do not have it.
    seed = block.get("eval_seed", -1)
    share = dataset_lib.permutation(
        len(fits), config["seed"] if seed < 0 else seed, 0, stream=1)
    chosen = sorted(fits[share[:block["eval_rows"]]].tolist())
    rest = sorted(set(range(len(rows))) - set(chosen))
    others, train_rows, held_rows = (
        examples, rows.select(rest), rows.select(chosen))
  else:
    others, chosen, train_rows, held_rows = examples, [], rows, None
  # Runs of earlier versions do not have it.
  if wanted := block.get("train_rows", 0):
    if wanted > len(train_rows):
      raise errors.UsageError(
          f"data.train_rows={wanted}, but {len(train_rows)} rows of "
          f"{block['path']} are not held out; lower it")
    train_rows = train_rows.select(range(wanted))
  train_rows, counts = dataset_lib.fit(
      train_rows, block["max_length"], block["overlong"])
  print(f"data: {counts.kept} rows to train on ({counts.truncated} truncated, "
        f"{counts.dropped} dropped at data.max_length={block['max_length']}), "
        f"{0 if held_rows is None else len(held_rows)} held out"
        + ("" if known.doubles is None else
           f", {known.doubles} equal to earlier ones left out"))
  return train_rows, held_rows, [others[int(i)] for i in chosen]


def prompt(
    model: api.Model, example: formats.Example, system: str
) -> tuple[list[int], str, str] | None:
  """(tokens, prompt, reference) of a row, or None if it has no prompt."""
  if example.messages is not None:
    turn = next((i for i, m in enumerate(example.messages)
                 if m["role"] == "assistant"), None)
    if turn is None:
      return None
    asked = example.messages[:turn]
    tokens = templates.encode_prompt(
        asked, model.tokenizer, add_system=system or None)
    text = "\n\n".join(m["content"] for m in asked)
    return tokens.tolist(), text, example.messages[turn]["content"]
  if example.completion is not None:
    text = example.prompt or ""
    tokens = templates.encode_text(text, model.tokenizer)
    return tokens.tolist(), text, example.completion
  return None


def prompts(
    model: api.Model, examples: Sequence[formats.Example], system: str,
    count: int
) -> list[tuple[list[int], str, str]]:
  """`prompt` of the first `count` examples that have one."""
  found = (prompt(model, example, system) for example in examples)
  return [p for p in found if p is not None][:count]
