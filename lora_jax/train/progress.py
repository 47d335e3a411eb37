"""A line that says how a run is getting on."""

from __future__ import annotations

import sys
import time
from typing import TextIO


def clock(seconds: float) -> str:
  """`1:02:03` or `2:03`."""
  seconds = max(0, round(seconds))
  hours, rest = divmod(seconds, 3600)
  minutes, seconds = divmod(rest, 60)
  if hours:
    return f"{hours}:{minutes:02}:{seconds:02}"
  return f"{minutes}:{seconds:02}"


class Progress:
  """Rewrites one line on a terminal; plain lines elsewhere.

  Attributes:
    steps: how many steps the run has.
    every: print every so many steps where it is not a terminal.
  """

  def __init__(self, steps: int, every: int, out: TextIO | None = None):
    self.steps = steps
    self.every = max(1, every)
    self._out = out or sys.stdout
    self._tty = self._out.isatty()
    self._start: tuple[float, int] | None = None
    self._width = 0

  def update(self, step: int, loss: float, tokens_per_s: float) -> None:
    """Shows step `step` (1-based), its loss in nats, and the speed."""
    now = time.monotonic()
    if self._start is None:
      self._start = now, step
      eta = "-:--"
    else:
      began, first = self._start
      eta = clock((now - began) / (step - first) * (self.steps - step))
    line = (f"step {step}/{self.steps}  loss {loss:.4f}  "
            f"{tokens_per_s:,.0f} tok/s  ETA {eta}")
    if self._tty:
      self._out.write("\r" + line.ljust(self._width))
      self._width = len(line)
      self._out.flush()
    elif step % self.every == 0 or step in (1, self.steps):
      self.note(line)

  def note(self, line: str) -> None:
    """Prints a line of its own, above the progress line."""
    if self._tty and self._width:
      self._out.write("\r" + " " * self._width + "\r")
      self._width = 0
    self._out.write(line + "\n")
    self._out.flush()
