"""Lines as rows to be read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from experiments.bench import lines

Column = tuple[str, int, Callable[[lines.Line], str]]


def _text(*names: str, separator: str = " ") -> Callable[[lines.Line], str]:
  return lambda line: separator.join(
      str(line[n]) for n in names if line.get(n) not in (None, ""))


def _digits(value: float) -> str:
  """Three digits at least: 12,345, 123, 12.3, 0.0123."""
  return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _number(name: str, scale: float = 1.0, form: Callable = _digits):
  def text(line):
    value = line.get(name)
    return "-" if value is None else form(value * scale)

  return text


def _percent(name: str) -> Callable[[lines.Line], str]:
  return _number(name, 100)


def _span(name: str, scale: float):
  """Median and, in brackets, the least and the most."""

  def text(line):
    middle, low, high = (
        _number(n, scale)(line) for n in (name, f"{name}_min", f"{name}_max"))
    return f"{middle} [{low}, {high}]"

  return text


def _peak(line: lines.Line) -> str:
  """A step whose peak is not above the one before it had at most that."""
  peak, before = line.get("peak_bytes"), line.get("peak_bytes_before")
  if peak is None:
    return "-"
  bound = "<=" if before is not None and peak <= before else ""
  return bound + _digits(peak / 2**30)


def _planned(line: lines.Line) -> str:
  parts = [_number(n, 2**-30)(line)
           for n in ("argument_bytes", "temporary_bytes")]
  return "+".join(parts)


def _losses(line: lines.Line) -> str:
  both = [_number(n, 1, "{:.3f}".format)(line)
          for n in ("loss_first", "loss_last")]
  note = "" if line.get("finite", True) else " NOT FINITE"
  return " -> ".join(both) + note


def _rate(line: lines.Line) -> str:
  for name, unit in (("tflops", "TFLOP/s"), ("gb_per_s", "GB/s")):
    if line.get(name) is not None:
      return f"{_digits(line[name])} {unit}"
  return "-"


def _model(line: lines.Line) -> str:
  method = line.get("method", "")
  if method not in ("full", "none"):
    method += f" r={line.get('rank')}"
  return " ".join(filter(None, (
      line.get("geometry"), line.get("changes"), line.get("format"), method,
      line.get("dtype"))))


def _shape(line: lines.Line) -> str:
  shape = "x".join(map(str, line.get("shape") or ()))
  rows = line.get("rows")
  return shape if rows is None else f"{rows} x {shape}"


def _case(line: lines.Line) -> str:
  return f"{line.get('batch')}x{line.get('length')}" + (
      f" in {line['packed']}" if line.get("packed") else "")


_STEP: list[Column] = [
    ("step ms [min, max]", 28, _span("step_s", 1e3)),
    ("tok/s", 10, _number("tokens_per_s")),
    ("TFLOP/s", 8, _number("model_tflops")),
    ("% matmul", 8, _percent("share_of_matmul")),
    ("peak GiB", 8, _peak)]
_LOSS: list[Column] = [("loss", 17, _losses)]

COLUMNS: dict[str, list[Column]] = {
    "ceilings": [
        ("ceiling", 24, _text("name")), ("rate", 18, _rate),
        ("ms [min, max]", 28, _span("call_s", 1e3))],
    "kernels": [
        ("kernel", 11, _text("name")), ("format", 12, _text("format")),
        ("shape", 17, _shape),
        ("us [min, max]", 28, _span("call_s", 1e6)),
        ("copies", 6, _text("copies")),
        ("GB/s", 9, _number("gb_per_s")),
        ("% copy", 6, _percent("share_of_copy"))],
    "train": [
        ("train", 34, _model), ("shape", 10, _case),
        ("remat", 6, _text("remat")), *_STEP,
        ("planned GiB", 11, _planned),
        ("compile s", 9, _number("compile_s")), *_LOSS],
    "decode": [
        ("decode", 34, _model), ("rows", 4, _text("batch")),
        ("tokens", 9, _text("prompt", "new", separator="+")),
        ("tok/s", 10, _number("tokens_per_s")),
        ("ms a token", 10, _number("token_s", 1e3)),
        ("prompt ms", 9, _number("prefill_s", 1e3)),
        ("GB/s", 9, _number("gb_per_s")),
        ("% copy", 6, _percent("share_of_copy"))],
    "startup": [
        ("start", 34, _model), ("cache", 6, _text("cache")),
        ("first step s", 12, _number("first_step_s")),
        ("imports s", 9, _number("imports_s")),
        ("model s", 9, _number("model_s"))],
    "peers": [
        ("peer", 34, _text("name", "geometry", "changes")),
        ("shape", 10, lambda line: (
            _case(line) if "batch" in line else _shape(line))),
        ("remat", 7, _text("checkpointing")), *_STEP, *_LOSS,
        ("kernel", 16, _rate)],
}


class Table:
  """Rows one by one, a heading before those of another part."""

  def __init__(self, put: Callable[[str], Any] = print):
    self._put, self._part = put, None

  def __call__(self, line: lines.Line) -> None:
    part = line["part"]
    columns = COLUMNS[part]
    if part != self._part:
      self._part = part
      self._put("\n" + _joined(columns, [name for name, _, _ in columns]))
    if "error" in line:
      about = _about(line)
      self._put(f"{part}: {about}: {line['error']}")
    else:
      self._put(_joined(columns, [show(line) for _, _, show in columns]))


def _joined(columns, cells) -> str:
  # The first column is text; numbers stand at the right.
  padded = [cell.rjust(width) if i else cell.ljust(width)
            for i, ((_, width, _), cell) in enumerate(
                zip(columns, cells, strict=True))]
  return "  ".join(padded).rstrip()


def _about(line: lines.Line) -> str:
  words = [str(line["name"])]
  for name in ("format", "shape", "rows", "batch", "length", "remat",
               "checkpointing", "cache"):
    if line.get(name) is not None:
      words.append(f"{name}={line[name]}")
  return " ".join(words)
