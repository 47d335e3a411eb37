"""What a sink is told, and what it keeps in the work directory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import json
import pathlib
from typing import Any, Protocol

from lora_jax import errors

WANDB_MODES = ("online", "offline")


@dataclasses.dataclass(frozen=True)
class LogConfig:
  """The `log` block of a config.

  Attributes:
    sinks: keys of `registry.SINKS`, separated by commas; empty is none.
    project: W&B's project, MLflow's experiment.
    name: of the run; empty is the work directory's.
    wandb_mode: `online`, or `offline` (send it later by `wandb sync`).
    mlflow_uri: tracking server or store; empty is MLFLOW_TRACKING_URI if that
      is set, else `mlflow.db` beside the work directory.
    timeout: seconds that the end of a run waits for its sinks.
  """

  sinks: str = ""
  project: str = "lora_jax"
  name: str = ""
  wandb_mode: str = "online"
  mlflow_uri: str = ""
  timeout: float = 30.0

  @property
  def names(self) -> tuple[str, ...]:
    parts = (part.strip() for part in self.sinks.split(","))
    return tuple(dict.fromkeys(filter(None, parts)))

  def validate(self) -> LogConfig:
    """Returns itself; raises `errors.UsageError` on a bad value."""
    from lora_jax.train.sinks import registry

    for name in self.names:
      errors.choose("log.sinks", name, registry.SINKS)
    errors.choose(
        "log.wandb_mode", self.wandb_mode, dict.fromkeys(WANDB_MODES))
    if self.timeout < 0:
      raise errors.UsageError(
          f"log.timeout={self.timeout} is out of range; use seconds, at "
          "least 0")
    return self

  def run_name(self, folder: pathlib.Path) -> str:
    return self.name or folder.absolute().name


class Sink(Protocol):
  """A receiver of metrics, made from a `LogConfig`.

  All calls come from one thread that is the sink's own. It may raise
  whatever it likes: it is then dropped with a warning.
  """

  def start(
      self, config: Mapping[str, Any], folder: pathlib.Path, resumed_step: int
  ) -> None:
    """Opens the run.

    Args:
      config: resolved, as in `config.json`.
      folder: the work directory.
      resumed_step: the checkpoint's step, -1 for a run from the start. Later
        steps come (again): they must not end up there twice.
    """

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """A line of `metrics.jsonl`, of a step or of an evaluation."""

  def text(self, step: int, samples: Sequence[str]) -> None:
    """Generations after `step` steps."""

  def finish(self, summary: Mapping[str, Any] | None) -> None:
    """Closes the run: `summary.json`, or None if the run has failed."""


def recall(folder: pathlib.Path, name: str) -> dict[str, Any]:
  """What `remember` kept for a sink; empty without."""
  try:
    return json.loads((folder / "sinks" / f"{name}.json").read_text())
  except (FileNotFoundError, ValueError):
    return {}


def remember(folder: pathlib.Path, name: str, value: dict[str, Any]) -> None:
  """Keeps a JSON value for the sink of a run that goes on."""
  path = folder / "sinks" / f"{name}.json"
  path.parent.mkdir(exist_ok=True)
  temporary = path.with_suffix(".tmp")
  temporary.write_text(json.dumps(value))
  temporary.replace(path)


def flat(
    tree: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
  """`{"train": {"steps": 4}}` -> `("train.steps", 4)`."""
  for key, value in tree.items():
    if isinstance(value, Mapping):
      yield from flat(value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}", value


def markdown(value: Any) -> str:
  """A JSON value as a block of code."""
  return f"```json\n{json.dumps(value, indent=2)}\n```"
