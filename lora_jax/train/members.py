"""Runs side by side: one compiled step trains several adapters on one base.

  states [m, ...], frozen [m, ...], base, batches [m, a, b, t], hypers [m]
    -> states [m, ...], metrics [m]

is `step.train_step` under `vmap`, with the base of none: frozen products become
products of m times the rows, and weights are dequantised once for all members.
Each member has its own rank, data, learning rates, optimiser, seed, length,
and files, and computes what it would alone, up to the order of sums: ranks are
made equal by zeros, which have no gradient (`Adapter.pads`), clipping and
the test for finite numbers are a member's own. One that has ended, by its
steps, its patience or a mistake, is carried along without effect.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Hashable, Sequence
import dataclasses
import functools
import inspect
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import errors
from lora_jax import types
from lora_jax.adapters import partition
from lora_jax.train import checkpoint as checkpoint_lib
from lora_jax.train import compiles as compiles_lib
from lora_jax.train import loop
from lora_jax.train import memory as memory_lib
from lora_jax.train import optim as optim_lib
from lora_jax.train import progress as progress_lib
from lora_jax.train import record as record_lib
from lora_jax.train import step as step_lib

# Members of a group of which the widest has at most so many times the rank.
WASTE = 2.0


@dataclasses.dataclass(frozen=True)
class Member:
  """A run that could be on its own: the arguments of `loop.fit`."""

  task: loop.Task
  state: step_lib.TrainState
  config: loop.TrainConfig
  folder: pathlib.Path


def kind(member: Member) -> Hashable | None:
  """What has to be equal for members to train together; None: only alone.

  Shapes count up to ranks, where the adapters' padding does nothing.
  """
  task = member.task
  if task.settings.mesh is not None or task.memory.chooses or any(
      task.settings.offload):
    return None
  leaves, structure = jax.tree.flatten((member.state, task.frozen))
  pads = _pads(member)
  return (
      id(task.base), task.model,
      dataclasses.replace(task.settings, noise=False), task.memory, structure,
      tuple((x.dtype, x.ndim if pads else x.shape) for x in leaves),
      task.batches.batch(0).tokens.shape)


def _pads(member: Member) -> bool:
  """Whether zeros behind its parameters change nothing.

  Adam in 8 bits has blocks of parameters, and what is stored in 16 bits is
  rounded by draws for all of an array: both would see the zeros.
  """
  task, params = member.task, member.state.params
  return (
      task.settings.optimizer == "adamw" and not task.settings.rules
      and all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
      and all(getattr(a, "pads", False) for a in jax.tree.leaves(
          params, is_leaf=partition.is_adapter)))


def groups(members: Sequence[Member], most: int = 8) -> list[list[int]]:
  """Indices of members that train together, at most so many at a time.

  The ranks of a group differ by no more than `WASTE`, so that padding at most
  doubles what adapters cost.
  """
  found: dict[Hashable, list[int]] = {}
  for index, member in enumerate(members):
    found.setdefault(kind(member) or ("alone", index), []).append(index)
  cut = []
  for group in found.values():
    sizes = {i: _size(members[i].state.params) for i in group}
    part: list[int] = []
    for i in sorted(group, key=lambda i: (sizes[i], i)):
      if part and (len(part) == most or sizes[i] > WASTE * sizes[part[0]]):
        cut.append(part)
        part = []
      part.append(i)
    cut.append(part)
  return sorted(cut)


def _size(tree: types.Tree) -> int:
  return sum(x.size for x in jax.tree.leaves(tree))


def fit(
    members: Sequence[Member],
    note: Callable[[str], None] | None = None,
) -> list[loop.Outcome | errors.UserError]:
  """Trains members of one `kind` together, each from its newest checkpoint.

  Args:
    members: of one kind; their states are donated.
    note: is told, in a line, what happens; prints by default.

  Returns:
    Of each what `loop.fit` returns, or the error that ended it alone.
  """
  return _Together(members, note).run()


class _One:
  """The mutable side of a member."""

  def __init__(self, member, number, note):
    self.member, self.number = member, number
    task, config = member.task, member.config
    self.record = record_lib.Record(
        config, member.folder, task.learning_rates, task.batches.row_indices,
        task.sinks, lambda line: note(f"[{number}] {line}"))
    self.checkpoints = checkpoint_lib.Checkpoints(
        member.folder / "checkpoints", config.keep)
    self.step = 0  # Of the next step; metrics may be one behind.
    self.began = time.monotonic()
    self.stopped = False
    self.ended: loop.Outcome | errors.UserError | None = None
    self.like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), member.state)

  def restore(self):
    """The state to begin with, of this member's own shapes."""
    state, before = self.member.state, -1
    restored = self.checkpoints.restore(state)
    if restored is not None:
      state, meta = restored
      meta.pop("base_digest", None)
      self.record.progress = record_lib.Progress.from_meta(meta)
      before = self.step = self.record.progress.step
    self.began = time.monotonic() - self.record.progress.seconds
    self.record.open(before)
    return state, restored is None

  @property
  def stands_still(self) -> bool:
    """Whether there is something to do with the state after this step."""
    config = self.member.config
    return (config.due(config.eval_every, self.step)
            or config.due(config.checkpoint_every, self.step))

  def batch(self):
    return self.member.task.batches.batch(self._next)

  def hyper(self):
    task = self.member.task
    rate = 0.0 if self.ended else task.learning_rates[self._next]
    return optim_lib.hyper(task.optim, rate)

  @property
  def _next(self) -> int:
    # One that has ended is fed something.
    return max(0, min(self.step, self.member.config.steps - 1))

  def evaluate(self, params, base, number):
    task = self.member.task
    if task.evaluate is None:
      return
    if self.record.evaluation(
        task.evaluate(params, base), number) and task.save_best is not None:
      task.save_best(params, base, number)

  def sample(self, params, base, number):
    if self.member.task.sample is not None:
      self.record.samples(self.member.task.sample(params, base), number)

  def close(self):
    self.record.close()
    self.checkpoints.close()


class _Together:
  """The mutable side of `fit`: the stacks, and metrics on their way."""

  def __init__(self, members, note):
    first = members[0].task
    steps = max(m.config.steps for m in members)
    self.line = progress_lib.Progress(
        steps, max(1, min(m.config.log_every for m in members)))
    note = note or self.line.note
    self.ones = [_One(m, i, note) for i, m in enumerate(members)]
    self.base, self.model = first.base, first.model
    settings = dataclasses.replace(
        first.settings, noise=any(m.task.settings.noise for m in members),
        attention=dataclasses.replace(first.settings.attention, mapped=True))
    self.choice = memory_lib.start(
        settings, first.memory, first.batches.batch(0).tokens.shape[1])
    self.settings = self.choice.settings(settings)
    self.frozen = _stack([m.task.frozen for m in members])
    self.keys = jnp.stack([m.task.key for m in members])
    self.compiles = compiles_lib.CompileClock()
    self.pending: collections.deque = collections.deque()

  def run(self):
    try:
      with self.compiles:
        return self._run()
    finally:
      for one in self.ones:
        one.close()

  def _run(self):
    begun = [one.restore() for one in self.ones]
    for one, (state, fresh) in zip(self.ones, begun, strict=True):
      if fresh:
        self._guarded(one, state, lambda one, s: (
            one.evaluate(s.params, self.base, 0),
            one.sample(s.params, self.base, 0)))
      one.stopped = one.record.stale()
      if one.ended is None and (
          one.stopped or one.step >= one.member.config.steps):
        self._end(one, state)
    self.state = _stack([state for state, _ in begun])
    del begun
    self.clock = self._now()
    while any(one.ended is None for one in self.ones):
      self._step()
    return [one.ended for one in self.ones]

  def _now(self):
    return time.monotonic() - self.compiles.seconds

  def _step(self):
    active = [one for one in self.ones if one.ended is None]
    batch = jax.tree.map(
        lambda *x: np.stack(x),
        *(self.choice.split(one.batch()) for one in self.ones))
    hyper = jax.tree.map(
        lambda *x: np.stack(x), *(one.hyper() for one in self.ones))
    self.state, metrics = _train_steps(
        self.state, self.frozen, self.base, batch, hyper, self.keys,
        model=self.model, settings=self.settings)
    for one in active:
      one.step += 1
    self.pending.append(([(one, one.step) for one in active], metrics))
    still = any(one.stands_still for one in active)
    while len(self.pending) > (0 if still else 1):
      self._drain_one()
    for one in active:
      if one.ended is None and one.stands_still:
        self._guarded(one, None, self._after)
    if still:
      self.clock = self._now()

  def _drain_one(self):
    told, metrics = self.pending.popleft()
    metrics = jax.device_get(metrics)
    now, losses, total = self._now(), [], 0
    seconds, self.clock = max(now - self.clock, 1e-9), now
    for one, number in told:
      own = {k: v[one.number].item() for k, v in metrics.items()}
      total += own["tokens"]
      losses.append(own["loss"])
      if one.ended is None:
        self._guarded(one, None, lambda one, _, own=own, number=number: (
            one.record.step(number, own, own["tokens"] / seconds)))
    self.line.update(
        max(number for _, number in told), float(np.mean(losses)),
        total / seconds)

  def _guarded(self, one, state, do):
    """What concerns one member alone; its error ends no other."""
    try:
      do(one, state)
    except errors.UserError as error:
      one.ended = error
      one.record.note(f"error: {error}")

  def _after(self, one, state):
    """Whatever is due for a member after a step."""
    config, number = one.member.config, one.step
    state = self._state(one)
    if config.due(config.eval_every, number):
      one.evaluate(state.params, self.base, number)
      one.stopped = one.record.stale()
      if number == config.steps or one.stopped:
        one.sample(state.params, self.base, number)
    if config.due(config.checkpoint_every, number) or one.stopped:
      one.record.progress.seconds = time.monotonic() - one.began
      one.record.sync()
      one.checkpoints.save(
          number, state, one.record.progress.meta() | {
              "base_digest": one.member.task.base_digest},
          one.record.progress.best_step)
    if one.stopped or number == config.steps:
      self._end(one, state)

  def _end(self, one, state):
    one.ended = loop.Outcome(
        state, self.base, one.record.progress, self.compiles.seconds,
        self.compiles.count, one.stopped)

  def _state(self, one):
    """A member's state, of its own shapes."""
    return jax.tree.map(
        lambda x, like: x[(one.number, *map(slice, like.shape))],
        self.state, one.like)


def _stack(trees: Sequence[types.Tree]) -> types.Tree:
  """Trees on top of each other, filled with zeros to the largest shapes."""
  def padded(x, shape):
    if x.shape == shape:
      return x
    return jnp.pad(x, [
        (0, most - own) for own, most in zip(x.shape, shape, strict=True)])

  def one(*leaves):
    shape = tuple(map(max, zip(*(x.shape for x in leaves), strict=True)))
    return jnp.stack([padded(x, shape) for x in leaves])

  return jax.tree.map(one, *trees)


@functools.partial(
    jax.jit, static_argnames=("model", "settings"), donate_argnames="state",
    compiler_options=step_lib.COMPILER_OPTIONS)
def _train_steps(state, frozen, base, batch, hyper, keys, *, model, settings):
  """`step.train_step` of all members."""
  # The options of the whole program are given above.
  step = functools.partial(
      inspect.unwrap(step_lib.train_step), model=model, settings=settings)
  return jax.vmap(step, in_axes=(0, 0, None, 0, 0, 0))(
      state, frozen, base, batch, hyper, keys)
