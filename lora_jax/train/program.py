"""The program of a run's steps: chosen to fit, made smaller if it did not.

A device may run out of memory all the same: something else took of it, or
what is free is in pieces. The step has then eaten its arguments (they are
donated), and those before it may be unfinished. A copy of the state on the
host, made whenever the run stands still, is what it goes on from: the steps
since are computed again from the same batches, by a program that needs less.
That happens once; the second time there is no telling how far it would go.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import time
from typing import Any

import jax
import numpy as np

from lora_jax import errors
from lora_jax import host as host_lib
from lora_jax import mesh as mesh_lib
from lora_jax import trees
from lora_jax import types
from lora_jax.train import footprint
from lora_jax.train import memory
from lora_jax.train import optim
from lora_jax.train import step as step_lib

# The largest state that is copied to the host. On a CPU that is the same
# memory, which seldom runs out with an error that could be caught.
COPIED = {"cpu": 2**28}
COPIED_ELSEWHERE = 2**33
# Seconds of work that may be lost: a copy at least this often.
EVERY = 600.0
REMEDY = (
    "lower train.batch_size (raise train.accumulation), data.max_length or "
    "adapter.rank, or spread the model over more devices (mesh.fsdp)")


def out_of_memory(error: BaseException) -> bool:
  """Whether a device, or XLA for it, could not allocate."""
  return (isinstance(error, jax.errors.JaxRuntimeError)
          and "RESOURCE_EXHAUSTED" in str(error))


@dataclasses.dataclass(frozen=True)
class Copy:
  """A state on the host.

  Attributes:
    state: numpy arrays.
    places: where each was, in the order of the leaves; None for anywhere.
    step: steps done.
    time: when, `time.monotonic()`.
  """

  state: types.Tree
  places: tuple[jax.sharding.Sharding | None, ...]
  step: int
  time: float


class Program:
  """`train_step` of a task under a choice.

  Attributes:
    base: the task's, in the memory that the choice wants it in.
    choice: how the steps are computed.
    plan: why, if it was chosen.
  """

  def __init__(self, task: Any, note: Callable[[str], None]):
    """The task as it is configured.

    Args:
      task: a `loop.Task`.
      note: is told, in a line, what is chosen and why.

    Raises:
      errors.UsageError: see `memory.start`.
    """
    self._task, self._note = task, note
    self._copy: Copy | None = None
    self._again = False
    self.base = task.base
    self.plan: memory.Plan | None = None
    self._shape = task.batches.batch(0).tokens.shape
    self.choice = memory.start(task.settings, task.memory, self._shape[1])

  def choose(
      self, state: step_lib.TrainState, number: int) -> step_lib.TrainState:
    """Chooses what fits, if the config wants that and the memory is known.

    Args:
      state: of the next step; donated.
      number: steps done.

    Returns:
      The state, in the memory that the choice wants it in.

    Raises:
      errors.UserError: if nothing fits into the budget that is set.
    """
    config = self._task.memory
    if not config.chooses or number >= len(self._task.learning_rates):
      return host_lib.beside(state, self.base)
    step = self._open(state, number)
    room = footprint.room(config, footprint.resident(step.trees))
    if room is None:
      self._note("memory: this device does not say what it has; set "
                 "memory.budget_gib to have a program chosen that fits")
      return host_lib.beside(state, self.base)
    plan = self._plan(step, room.free)
    total, need = (
        f"{n / memory.GIB:.1f}" for n in (room.total, plan.need + room.held))
    if not plan.fits and config.budget_gib:
      raise errors.UserError(
          f"memory.budget_gib={config.budget_gib:g}: with "
          f"{self._text(plan.choice)} a step still needs {need} of {total} "
          f"GiB; {REMEDY}")
    line = f"memory: {self._text(plan.choice)}: {need} of {total} GiB"
    if plan.refused is not None:
      faster, least = plan.refused
      line += (f" ({self._text(faster)} would need "
               f"{(least + room.held) / memory.GIB:.1f})")
    self._note(line if plan.fits else f"{line}; nothing fits, trying this")
    return self._take(plan, state)

  def step(
      self, state: step_lib.TrainState, number: int
  ) -> tuple[step_lib.TrainState, dict[str, jax.Array]]:
    """Step `number`, counted from 0."""
    task = self._task
    batch = self.choice.split(task.batches.batch(number))
    return step_lib.train_step(
        state, task.frozen, self.base, task.place(batch),
        optim.hyper(task.optim, task.learning_rates[number]), task.key,
        model=task.model, settings=self.choice.settings(task.settings))

  def keep(self, state: step_lib.TrainState, number: int) -> None:
    """Copies the state after `number` steps, if it may be needed."""
    leaves = jax.tree.leaves(state)
    devices = {d.platform for x in leaves for d in x.sharding.device_set}
    limit = max(COPIED.get(d, COPIED_ELSEWHERE) for d in devices)
    self._copy = None
    if self._again or trees.nbytes(state) > limit or not all(
        x.is_fully_addressable for x in leaves):
      return
    self._copy = Copy(
        # Copied on a CPU, too, where asarray would lend what is donated next.
        jax.tree.map(np.array, state),
        tuple(x.sharding if x.committed else None for x in leaves),
        number, time.monotonic())

  def due(self) -> bool:
    """Whether the last copy is old enough for another."""
    return (self._copy is not None
            and time.monotonic() - self._copy.time > EVERY)

  def shrink(self, reason: str) -> tuple[step_lib.TrainState, int]:
    """After running out of memory: a smaller program, and an earlier state.

    Args:
      reason: what XLA said.

    Returns:
      The state to go on from, and its number of steps.

    Raises:
      errors.UserError: if this happened before, the state is not kept, or
        there is nothing smaller.
    """
    copy, self._copy = self._copy, None
    if copy is None:
      raise self.complaint(reason)
    self._again = True
    leaves, structure = jax.tree.flatten(copy.state)
    state = jax.tree.unflatten(structure, [
        jax.device_put(x, where) for x, where in zip(
            leaves, copy.places, strict=True)])
    step = self._open(state, copy.step)
    was = self.choice
    plan = self._plan(step, memory.SMALLER * step.need(was))
    if not plan.fits:
      raise self.complaint(reason)
    self._note(
        f"memory: the device ran out of it with {self._text(was)}; going on "
        f"from step {copy.step} with {self._text(plan.choice)}")
    return self._take(plan, state), copy.step

  def complaint(self, reason: str) -> errors.UserError:
    """Of running out of memory anywhere in a run, for users.

    Args:
      reason: what XLA said.
    """
    first = " ".join(reason.split("\n")[0].split())[:200]
    wish = ("" if self._task.memory.chooses
            else "set memory.auto=True to have a program chosen that fits, or ")
    return errors.UserError(
        f"the device ran out of memory with {self._text(self.choice)} "
        f"({first}); {wish}{REMEDY} (checkpoints are intact)")

  def _text(self, choice):
    return choice.text(*self._shape[:2])

  def _plan(self, step, budget):
    task = self._task
    kinds = (host_lib.movable(task.base, task.donate)
             if host_lib.all_apart() else ())
    choices = memory.candidates(
        task.settings, task.memory, self._shape[1:],
        mesh_lib.ways(task.settings.mesh), kinds)
    return memory.choose(choices, budget, step.bound, step.need)

  def _take(self, plan, state):
    """Goes on by a plan: what it wants elsewhere is moved there."""
    self.plan, self.choice = plan, plan.choice
    task, offload = self._task, plan.choice.offload
    if task.donate:
      move, base = host_lib.handed_over, self.base
    else:
      move, base = host_lib.moved, task.base
    self.base = host_lib.base_by(move, base, "base" in offload)
    state = dataclasses.replace(state, opt_state=host_lib.state_by(
        host_lib.handed_over, state.opt_state, "optimiser" in offload))
    return host_lib.beside(state, self.base)

  def _open(self, state, number):
    task = self._task
    return footprint.Step(
        task.model, task.settings, state, task.frozen, self.base,
        task.batches.batch(number),
        optim.hyper(task.optim, task.learning_rates[number]), task.key,
        task.place)
