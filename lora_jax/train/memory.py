"""How a training step is made to fit in the memory of its devices.

A `Choice` says what the backward pass keeps, in how many tiles an MLP is
computed, what lives in host memory, and into how many parts a micro-batch is
cut. Loss and gradients are the same to rounding under all of them; time and
memory are not. `choose` goes through the choices from the fastest on and takes
the first whose compiled program fits. Compiling takes seconds: a choice that
cannot fit by what its tensors alone take is passed over without.

Nothing here touches a device: what a program needs is told by `footprint`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
import dataclasses
import itertools

import jax

from lora_jax import errors
from lora_jax import types
from lora_jax.train import step as step_lib

GIB = 2**30

# Time of a step, relative to one that computes nothing twice and moves
# nothing. They order the choices and mean no more. Of an H100 (Llama-2-7B's
# geometry, 4 x 2048 tokens; `base`: Llama-2-70B's) are `full` to `named`, 16.8
# to 14.0 thousand tokens a second, and `base`, 1604 to 1312.
REMAT = {"none": 1.0, "named": 1.02, "full": 1.22}
OFFLOAD = {"activations": 1.05, "optimiser": 1.05, "base": 1.22}
TILED = 1.05
# Every micro-batch dequantises the base again. That takes as long as the
# products of so many tokens: 2.5 bytes a parameter at 2.64 TB/s, against 2
# operations at 470 TFLOP/s (the same card).
TOKENS_OF_A_PASS = 222
# Tokens of a device below which a tile is not made by itself: the MLP's
# weights are dequantised for each.
TILE_TOKENS = 2048
# What one more attempt after running out of memory may need, of what the
# program that did not fit needs.
SMALLER = 0.8


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
  """The `memory` block of a config, and `compute.mlp_tiles`.

  Attributes:
    budget_gib: GiB of each device that a training step may take, with all
      that lives beside it; 0 is what the device says it has.
    auto: whether what is left open is chosen to fit; a budget implies it.
    micro_batch: rows of `train.batch_size` computed at a time; 0 leaves it
      open.
    mlp_tiles: tiles of tokens of an MLP; 0 leaves it open.
  """

  budget_gib: float = 0.0
  auto: bool = False
  micro_batch: int = 0
  mlp_tiles: int = 0

  def validate(self) -> MemoryConfig:
    """Returns itself; raises `errors.UsageError` on a bad value."""
    for field, value in (("memory.budget_gib", self.budget_gib),
                         ("memory.micro_batch", self.micro_batch),
                         ("compute.mlp_tiles", self.mlp_tiles)):
      if not value >= 0:
        raise errors.UsageError(
            f"{field}={value} is out of range; use a positive number, or 0 to "
            "have it chosen")
    return self

  def whole(self, b: int, why: str) -> MemoryConfig:
    """Itself, leaving tokens together whose values depend on each other.

    Args:
      b: rows of a batch.
      why: what makes them depend on each other, for the error.

    Raises:
      errors.UsageError: if it says to compute them apart.
    """
    for field, value, one in (
        ("memory.micro_batch", self.micro_batch, b),
        ("compute.mlp_tiles", self.mlp_tiles, 1)):
      if value not in (0, one):
        raise errors.UsageError(
            f"{field}={value}: {why} computes all tokens of a batch together; "
            f"leave it at 0, and lower train.batch_size={b} to save memory")
    return dataclasses.replace(self, micro_batch=b, mlp_tiles=1)

  @property
  def chooses(self) -> bool:
    return self.auto or self.budget_gib > 0

  def parts(self, b: int) -> int:
    """Into how many the b rows of a batch are cut; 1 if that is open.

    Raises:
      errors.UsageError: if `micro_batch` does not divide them.
    """
    rows = self.micro_batch or b
    if b % rows:
      divisor = min((n for n in range(1, b + 1) if b % n == 0),
                    key=lambda n: abs(n - rows))
      raise errors.UsageError(
          f"memory.micro_batch={rows} does not divide train.batch_size={b}; "
          f"use {divisor}")
    return b // rows


@dataclasses.dataclass(frozen=True)
class Choice:
  """What may be traded for memory.

  Attributes:
    remat: a key of `models.remat.POLICIES`.
    mlp_tiles: see `models.tiles`.
    offload: keys of `OFFLOAD`.
    parts: into how many micro-batches each of the config's is cut.
  """

  remat: str = "named"
  mlp_tiles: int = 1
  offload: tuple[str, ...] = ()
  parts: int = 1

  def settings(self, of: step_lib.Settings) -> step_lib.Settings:
    return dataclasses.replace(
        of, remat=self.remat, mlp_tiles=self.mlp_tiles, offload=self.offload)

  def split(self, batch: types.Batch) -> types.Batch:
    """`[a, b, t]` as `[a * parts, b / parts, t]`, the rows in their order."""
    a, b = batch.tokens.shape[:2]
    return jax.tree.map(
        lambda x: x.reshape(a * self.parts, b // self.parts, *x.shape[2:]),
        batch)

  def text(self, a: int, b: int) -> str:
    """`remat=full, 2 micro-batches of 2`, of batches `[a, b, t]`."""
    words = [f"remat={self.remat}"]
    if self.mlp_tiles > 1:
      words.append(f"mlp_tiles={self.mlp_tiles}")
    if self.offload:
      words.append(f"offload={'+'.join(self.offload)}")
    if a * self.parts > 1:
      words.append(f"{a * self.parts} micro-batches of {b // self.parts}")
    return ", ".join(words)


@dataclasses.dataclass(frozen=True)
class Plan:
  """A choice, and why.

  Attributes:
    choice: the fastest that fits, or the smallest.
    need: bytes of its compiled program on a device.
    fits: whether `need` is within what was allowed.
    refused: the fastest choice that does not fit with the bytes it needs at
      least, or None if the fastest fits.
  """

  choice: Choice
  need: int
  fits: bool
  refused: tuple[Choice, int] | None = None


def start(
    settings: step_lib.Settings, config: MemoryConfig, b: int
) -> Choice:
  """What the config says; where it leaves something open, the default.

  Raises:
    errors.UsageError: see `MemoryConfig.parts`.
  """
  return Choice(
      remat="named" if settings.remat == "auto" else settings.remat,
      mlp_tiles=config.mlp_tiles or 1, offload=settings.offload,
      parts=config.parts(b))


def candidates(
    settings: step_lib.Settings, config: MemoryConfig,
    shape: tuple[int, int], ways: int = 1,
    kinds: Collection[str] = ()
) -> list[Choice]:
  """All choices that keep what the config sets, the fastest first.

  Args:
    settings: of the step; what is not `auto` or empty is kept.
    config: the `memory` block; what is not 0 is kept.
    shape: b, t of a micro-batch of the config.
    ways: into how many parts the mesh cuts b; no micro-batch has fewer rows.
    kinds: keys of `OFFLOAD` that may be chosen.
  """
  (b, t), fixed = shape, start(settings, config, shape[0])
  splits = [fixed.parts] if config.micro_batch else [
      n for n in range(1, b + 1) if b % n == 0 and (b // n) % ways == 0]
  policies = list(REMAT) if settings.remat == "auto" else [fixed.remat]

  def found() -> Iterator[Choice]:
    for remat, parts in itertools.product(policies, splits or [1]):
      tokens = b // parts * t // ways
      for offload in _offloads(settings.offload, remat, kinds):
        for tiles in _tilings(config.mlp_tiles, remat, tokens):
          yield Choice(remat, tiles, offload, parts)

  return sorted(found(), key=lambda c: cost(c, b * t // ways))


def _offloads(fixed, remat, kinds):
  if fixed:
    return [fixed]
  # Only under `full` are a layer's inputs all that is kept.
  kinds = [kind for kind in OFFLOAD if kind in kinds
           and (kind != "activations" or remat == "full")]
  return [some for n in range(len(kinds) + 1)
          for some in itertools.combinations(kinds, n)]


def _tilings(fixed, remat, tokens):
  if fixed:
    return [fixed]
  # Elsewhere tiles compute again what the policy was chosen to keep.
  tiles = -(-tokens // TILE_TOKENS) if remat == "full" else 1
  return [1, tiles] if tiles > 1 else [1]


def cost(choice: Choice, tokens: int) -> float:
  """Expected time, relative to the fastest conceivable choice.

  Args:
    choice: of micro-batches that were not yet cut.
    tokens: of a device, in one of them.
  """
  # A policy that is not in the table is only ever the one that was set.
  time = REMAT.get(choice.remat, 1.0)
  time *= TILED if choice.mlp_tiles > 1 else 1.0
  for kind in choice.offload:
    time *= OFFLOAD[kind]
  return time * (1 + TOKENS_OF_A_PASS * choice.parts / max(tokens, 1))


def choose(
    choices: Sequence[Choice], budget: float,
    bound: Callable[[Choice], int], need: Callable[[Choice], int],
) -> Plan:
  """The first of `choices` that fits, else the one that needs least.

  Args:
    choices: at least one, the best first.
    budget: bytes.
    bound: bytes that a choice takes at least; cheap.
    need: bytes that its program takes; compiles it.
  """
  measured: dict[Choice, int] = {}

  def expected(choice):
    """The bound, and what the same with other rows, or less in host memory,
    needs beyond its own; that grows with the rows at most."""
    beyond = [
        (number - bound(other)) * min(1.0, other.parts / choice.parts)
        for other, number in measured.items()
        if set(other.offload) <= set(choice.offload) and dataclasses.replace(
            other, parts=choice.parts, offload=choice.offload) == choice]
    return int(bound(choice) + max([0.0, *beyond]))

  refused = None
  for choice in choices:
    number = expected(choice)
    if number <= budget:
      number = measured[choice] = need(choice)
      if number <= budget:
        return Plan(choice, number, True, refused)
    refused = refused or (choice, number)
  while True:
    least = min(choices, key=lambda c: measured.get(c, expected(c)))
    if least in measured:
      number = measured[least]
      return Plan(least, number, number <= budget, refused)
    measured[least] = need(least)
