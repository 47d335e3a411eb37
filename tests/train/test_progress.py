"""The progress line, with a clock of ours."""

from __future__ import annotations

import io

import pytest

from lora_jax.train import progress


class Terminal(io.StringIO):

  def isatty(self):
    return True


@pytest.fixture
def at(monkeypatch):
  """Sets the time."""
  now = [100.0]
  monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

  def change(seconds):
    now[0] = 100.0 + seconds

  return change


@pytest.mark.parametrize("seconds, text", [
    (0, "0:00"), (59.4, "0:59"), (61, "1:01"), (3599.6, "1:00:00"),
    (3723, "1:02:03"), (-5, "0:00")])
def test_clock(seconds, text):
  assert progress.clock(seconds) == text


def test_plain_lines_at_every_other_step(at):
  out = io.StringIO()
  line = progress.Progress(5, 2, out)
  for i in range(1, 6):
    at(10 * i)
    line.update(i, 2.0 / i, 1234.5)
  line.note("done")
  # Ten seconds a step: the first one says nothing about the others.
  assert out.getvalue().splitlines() == [
      "step 1/5  loss 2.0000  1,234 tok/s  ETA -:--",
      "step 2/5  loss 1.0000  1,234 tok/s  ETA 0:30",
      "step 4/5  loss 0.5000  1,234 tok/s  ETA 0:10",
      "step 5/5  loss 0.4000  1,234 tok/s  ETA 0:00",
      "done"]


def test_one_line_on_a_terminal(at):
  out = Terminal()
  line = progress.Progress(300, 50, out)
  line.update(1, 1.5, 10.0)
  at(2)
  line.update(2, 1.25, 10.0)
  line.note("a note")
  line.update(3, 1.125, 10.0)
  first, second, blank, note, third = out.getvalue().split("\r")[1:]
  assert first.startswith("step 1/300  loss 1.5000")
  assert "ETA 9:56" in second
  # What is longer is overwritten whole before the note.
  assert blank.isspace() and len(blank) >= len(first.rstrip())
  assert note == "a note\n"
  assert third.startswith("step 3/300")
  assert out.getvalue().count("\n") == 1


def test_a_resumed_run_counts_its_own_steps(at):
  out = io.StringIO()
  line = progress.Progress(100, 1, out)
  line.update(51, 1.0, 1.0)
  at(8)
  line.update(53, 1.0, 1.0)  # 4 seconds a step, 47 to go.
  assert out.getvalue().splitlines()[1].endswith("ETA 3:08")
