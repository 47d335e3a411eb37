"""What a step takes of a device's memory, before it runs.

XLA lays out all of a program's memory when it compiles it: what its arguments,
temporary values and results take is known then, on any platform, without a
byte being allocated. (Compiling for a GPU does not fail where running would.)
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import adapters
from lora_jax import host as host_lib
from lora_jax import types
from lora_jax.models import config as config_lib
from lora_jax.train import memory
from lora_jax.train import optim
from lora_jax.train import step as step_lib

# Of what a device has; a step's temporary values are one block, and what is
# free is not.
SPARE = 0.03
# Of what is free; a base that takes more leaves no room for any step.
BASE = 0.9


def needs(compiled: jax.stages.Compiled, away: int = 0) -> int:
  """Bytes on a device while a program runs, its arguments among them.

  Args:
    compiled: the program.
    away: bytes of its arguments that are in host memory. What has one memory
      (a CPU) counts them among the others.
  """
  found = compiled.memory_analysis()
  if found is None:
    return 0
  total = (found.argument_size_in_bytes + found.temp_size_in_bytes
           + found.output_size_in_bytes - found.alias_size_in_bytes)
  return total if found.host_argument_size_in_bytes else total - away


def resident(tree: types.Tree, away: bool = False) -> int:
  """Bytes of a tree's arrays on one device; abstract ones count as well.

  Args:
    tree: arrays, in whatever memory.
    away: whether to count those in host memory instead.
  """

  def one(x):
    if host_lib.is_away(x) != away:
      return 0
    where = getattr(x, "sharding", None)
    shape = x.shape if where is None else where.shard_shape(x.shape)
    return math.prod(shape) * x.dtype.itemsize

  return sum(map(one, jax.tree.leaves(tree)))


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
  """A step whose `memory.Choice` is still open.

  Attributes:
    model: the architecture.
    settings: static choices, of which a `Choice` changes some.
    state, frozen, base, batch, hyper, key: of `step.train_step`, the batch
      `[a, b, t]` on the host.
    place: puts a batch on the devices.
  """

  model: config_lib.ModelConfig
  settings: step_lib.Settings
  state: step_lib.TrainState
  frozen: types.Tree
  base: types.Tree
  batch: types.Batch
  hyper: optim.Hyper
  key: jax.Array
  place: Callable[[types.Batch], types.Batch] = lambda batch: batch
  _known: dict[Any, int] = dataclasses.field(default_factory=dict)

  @property
  def trees(self) -> tuple[Any, ...]:
    return self.state, self.frozen, self.base

  def described(self, choice: memory.Choice) -> tuple[Any, ...]:
    """`trees` as they are under a choice; nothing is moved for that."""
    base = host_lib.base_by(
        host_lib.described, self.base, "base" in choice.offload)
    state = dataclasses.replace(self.state, opt_state=host_lib.state_by(
        host_lib.described, self.state.opt_state,
        "optimiser" in choice.offload))
    return host_lib.beside(state, base), self.frozen, base

  def compile(self, choice: memory.Choice) -> jax.stages.Compiled:
    """The program under a choice."""
    return step_lib.train_step.lower(
        *self.described(choice), self.place(choice.split(self.batch)),
        self.hyper, self.key, model=self.model,
        settings=choice.settings(self.settings)).compile()

  def need(self, choice: memory.Choice) -> int:
    """Bytes on a device of the program under a choice, which is compiled."""
    away = resident(self.described(choice), away=True)
    return needs(self.compile(choice), away) or self.bound(choice)

  def bound(self, choice: memory.Choice) -> int:
    """Bytes that no such program does without: its arguments, and what the
    backward pass keeps of the layers."""
    kept = 0
    if "activations" not in choice.offload:
      mesh = self.settings.mesh
      what = choice.remat, choice.mlp_tiles
      if what not in self._known:
        self._known[what] = self._kept(*what)
      kept = self._known[what] // (
          choice.parts * (1 if mesh is None else mesh.size))
    return resident(self.described(choice)) + kept

  def _kept(self, remat, mlp_tiles):
    """Bytes kept for the backward pass of a whole micro-batch, on all
    devices; the step is only traced."""
    settings = dataclasses.replace(
        self.settings, remat=remat, mlp_tiles=mlp_tiles, mesh=None)
    rows = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), self.batch)
    # Of inputs there is one more; see `models.tape`.
    depths = [stop - start for start, stop in adapters.spans(
        self.frozen.layers, self.model.n_layers)]
    leads = [(depth + n, rows.tokens.shape[0])
             for depth in depths for n in (0, 1)]
    t = rows.tokens.shape[1]

    def residuals(params, frozen, base, batch, key):
      _, pullback = jax.vjp(
          lambda params: step_lib.weighted_sum(
              params, frozen, base, batch, key, model=self.model,
              settings=settings), params)
      return jax.tree.leaves(pullback)

    base = host_lib.base_by(host_lib.described, self.base, False)
    found = jax.eval_shape(
        residuals, self.state.params, self.frozen, base, rows, self.key)
    # The weights are among the residuals, too: not by layer, row and token.
    return sum(
        math.prod(x.shape) * x.dtype.itemsize for x in found
        if x.shape[:2] in leads and t in x.shape[2:]
        and jnp.issubdtype(x.dtype, jnp.floating))


@dataclasses.dataclass(frozen=True)
class Room:
  """What a device has for a step.

  Attributes:
    total: bytes that may be taken.
    held: bytes of it that are taken by what is no argument of the step.
  """

  total: int
  held: int = 0

  @property
  def free(self) -> int:
    return self.total - self.held


def room(config: memory.MemoryConfig, arguments: int) -> Room | None:
  """What the devices have for a step; None where that is not known.

  Args:
    config: the `memory` block.
    arguments: bytes on each device of the step's arguments, all of which are
      there by now.

  Returns:
    The same in every process: they must come to the same choice.
  """
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  limits = [s["bytes_limit"] * (1 - SPARE) for s in stats
            if s.get("bytes_limit")]
  if config.budget_gib:
    limits.append(config.budget_gib * memory.GIB)
  held = max(s.get("bytes_in_use", 0) for s in stats) - arguments
  found = np.asarray([min(limits, default=-1), -max(held, 0)], np.float64)
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    # Kept in float32 on the way, unless x64 is on: to 1 in 16 million.
    found = np.min(multihost_utils.process_allgather(
        found.astype(np.float32)), axis=0)
  total, held = int(found[0]), -int(found[1])
  return None if total < 0 else Room(total, held)


def outgrows(
    config: memory.MemoryConfig | None, size: Callable[[], int]) -> bool:
  """Whether a base is to be in host memory from the start.

  Args:
    config: the `memory` block; without one, or one that chooses nothing, no
      base is.
    size: bytes of the base on each device.
  """
  if not (config and config.chooses and host_lib.all_apart()):
    return False
  found = room(config, 0)
  return found is not None and size() > BASE * found.free
