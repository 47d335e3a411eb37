"""What training forgets: the loss of other rows, before and after it."""

from __future__ import annotations

from collections.abc import Callable
import pathlib
from typing import Any

from experiments import blocks
from lora_jax import api
from lora_jax import errors
from lora_jax import processes
from lora_jax.api import settings
from lora_jax.data import dataset as dataset_lib
from lora_jax.data import sources
from lora_jax.evaluate import statistics
from lora_jax.train import workdir as workdir_lib

FILE = "watched.json"


def rows(model: api.Model, config: dict[str, Any]) -> dataset_lib.Dataset:
  """The first `data.watch_rows` rows of `data.watch_path` that fit
  `data.eval_max_length` tokens.

  Raises:
    errors.UsageError: if none fits.
  """
  block = config["data"]
  found = model.encode(
      sources.read(blocks.locate(block["watch_path"]), block["watch_format"]),
      max_length=2**30, system=block["system"] or None)
  fits = (found.lengths <= block["eval_max_length"]).nonzero()[0]
  if not len(fits):
    raise errors.UsageError(
        f"data.watch_path={block['watch_path']}: no row has at most data.eval_"
        f"max_length={block['eval_max_length']} tokens; raise it")
  return found.select(fits[:block["watch_rows"] or None])


def begin(
    model: api.Model, config: dict[str, Any], folder: pathlib.Path
) -> Callable[[api.Model], dict[str, Any]]:
  """Evaluates a model that is about to be trained.

  Args:
    model: with adapters.
    config: resolved.
    folder: the work directory; `watched.json` will hold every row's losses.

  Returns:
    What gives, of the trained model, fields of the summary: `watched_before`,
    `watched_after`, `watched_change` and its 95% interval over rows, nats a
    token; none if nothing is watched.
  """
  # Runs of earlier versions do not have it.
  if not config["data"].get("watch_path"):
    return lambda trained: {}
  watched = rows(model, config)
  batch_size = settings.evaluated(config["train"]["batch_size"], watched)
  before = model.evaluate(watched, batch_size=batch_size)

  def end(trained: api.Model) -> dict[str, Any]:
    after = trained.evaluate(watched, batch_size=batch_size)
    change = statistics.paired_difference(
        before.nll, after.nll, before.weight)
    if processes.writes():
      workdir_lib.write_json(folder / FILE, {
          "before": before.nll.tolist(), "after": after.nll.tolist(),
          "weight": before.weight.tolist()})
    return {
        "watched_before": before.loss, "watched_after": after.loss,
        "watched_change": change.mean,
        "watched_change_95": [change.low, change.high]}

  return end
