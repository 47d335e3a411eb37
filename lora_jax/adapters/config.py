"""What an experiment says of its adapter, checked."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import re
from typing import Any

from lora_jax import errors
from lora_jax.adapters import depth
from lora_jax.adapters import options as options_lib
from lora_jax.adapters import starts


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
  """The `adapter` block of a config.

  Attributes:
    method: a key of `registry.METHODS`.
    rank: r of the low-rank methods, 1 to 4096.
    alpha: numerator of the scale, alpha/r (rsLoRA: alpha/sqrt(r)).
    dropout: rate on the adapter's input, in [0, 1).
    targets: which places; see `targets.select`. "auto" is the method's own.
    layers: which layers, `"0-7,20"` or `"last 8"`, or None for all.
    layer_replication: `"0-4,2-5"`, or pairs: a deeper model out of the same
      weights, whose layers are those of the ranges; see `depth`.
    rank_pattern: module name or regex -> rank (PEFT's rule).
    alpha_pattern: module name or regex -> alpha.
    init: where A and B start; see `starts`.
    options: what only this method is told: a mapping, or its own dataclass.
    loftq_iterations: of init="loftq".
    init_batches: how many batches of rows a start looks at that looks at rows.
    init_options: what only such a start is told, as `options`.
    modules_to_save: targets that are trained whole; see `saved`.
    trainable_token_indices: tokens whose embeddings are trained; see `tokens`.
      "new" stands for those that the model was given (`api.load`).
  """

  method: str = "lora"
  rank: int = 16
  alpha: float = 32.0
  dropout: float = 0.0
  targets: str | tuple[str, ...] = "auto"
  layers: str | tuple[int, ...] | None = None
  layer_replication: str | tuple[tuple[int, ...], ...] = ()
  rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
  alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
  options: Any = dataclasses.field(default_factory=dict)
  init: str = "default"
  loftq_iterations: int = 1
  init_batches: int = 8
  init_options: Any = dataclasses.field(default_factory=dict)
  modules_to_save: tuple[str, ...] = ()
  trainable_token_indices: tuple[int, ...] | str = ()

  def validate(self, options: type | None = None) -> AdapterConfig:
    """Returns itself, `options` as the dataclass of that type if it is given.

    Raises:
      errors.UsageError: if a value is out of range, or an option unknown.
    """
    if options is not None:
      return dataclasses.replace(
          self, options=options_lib.parse(
              "adapter.options", self.options, options),
          init_options=self.start().informed or {}).validate()
    ranks = {"adapter.rank": self.rank} | {
        f'adapter.rank_pattern["{k}"]': v for k, v in self.rank_pattern.items()}
    for place, rank in ranks.items():
      if not isinstance(rank, int) or not 1 <= rank <= 4096:
        raise errors.UsageError(
            f"{place}={rank} is out of range; use an integer from 1 to 4096")
    if not 0.0 <= self.dropout < 1.0:
      raise errors.UsageError(
          f"adapter.dropout={self.dropout} is out of range; use a rate in "
          "[0, 1)")
    if not 1 <= self.loftq_iterations <= 100:
      raise errors.UsageError(
          f"adapter.loftq_iterations={self.loftq_iterations} is out of range; "
          "use an integer from 1 to 100")
    if not isinstance(self.init_batches, int) or self.init_batches < 1:
      raise errors.UsageError(
          f"adapter.init_batches={self.init_batches} is out of range; use an "
          "integer of at least 1")
    self.start()
    for place, rank in ranks.items():
      if self.init == "orthogonal" and rank % 2:
        raise errors.UsageError(
            f"{place}={rank} is odd, and adapter.init=orthogonal halves it; "
            "use an even rank, or adapter.init=default")
    depth.ranges(self.layer_replication)
    alphas = {"adapter.alpha": self.alpha} | {
        f'adapter.alpha_pattern["{k}"]': v
        for k, v in self.alpha_pattern.items()}
    for place, alpha in alphas.items():
      if not alpha > 0:
        raise errors.UsageError(
            f"{place}={alpha} is out of range; use a positive number")
    return self

  def start(self) -> starts.Start:
    """Where A and B start.

    Raises:
      errors.UsageError: if `init` names nothing.
    """
    return starts.choose(
        self.init, self.loftq_iterations, self.init_options)


def by_pattern(path: str, pattern: Mapping, default):
  """The first entry of `pattern` whose key matches `path`, as PEFT does it.

  A key matches a whole module path or its end, as a regular expression:
  `re.match(r"(.*\\.)?(key)$", path)`.
  """
  for key, value in pattern.items():
    if re.match(rf"(.*\.)?({key})$", path):
      return value
  return default
