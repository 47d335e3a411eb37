"""A study's table as Markdown, CSV and one HTML file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
import csv
import html
import io
import pathlib
import re
import textwrap
from typing import Any

from experiments.sweep import cells as cells_lib
from experiments.table import results
from lora_jax.evaluate import statistics

COLUMNS = ("arm", "tuned to", "held-out loss", "95% interval", "less baseline",
           "95% interval of that", "p (Holm)", "watched", "parameters", "tok/s",
           "seeds")


def rows(
    arms: Sequence[results.Arm], baseline: results.Arm, main_commit: str | None
) -> list[list[str]]:
  """The table's cells, an arm a row."""
  others = [arm for arm in arms if arm is not baseline]
  differences = {arm.name: arm.less(baseline) for arm in others}
  adjusted = dict(zip(differences, statistics.holm(
      [d.p_value() for d in differences.values()]), strict=True))
  found = []
  for arm in arms:
    loss, difference = arm.loss(), differences.get(arm.name)
    mixed = any(run.commit != main_commit for run in arm.runs)
    watched = arm.loss("watched") if all(
        run.watched is not None for run in arm.runs) else None
    size, speed = arm.mean("trainable_parameters"), arm.mean("tokens_per_s")
    found.append([
        arm.name + " †" * mixed + " ‡" * bool(arm.missing),
        tuned_to(arm) + "*" * arm.edge,
        f"{loss.value:.4f}", _interval(loss),
        "" if difference is None else f"{difference.value:+.4f}",
        "" if difference is None else _interval(difference, "+"),
        "" if difference is None else f"{adjusted[arm.name]:.3g}",
        "" if watched is None else
        f"{watched.value:+.4f} {_interval(watched, '+')}",
        "" if size is None else f"{size:,.0f}",
        "" if speed is None else f"{speed:,.0f}", str(len(arm.runs))])
  return found


def tuned_to(arm: results.Arm) -> str:
  """The values that were chosen for an arm."""
  return ", ".join(
      f"{k.rpartition('.')[2]}={v:g}" for k, v in arm.chosen.items())


def _short(commit: str | None) -> str:
  first, dash, dirty = str(commit).partition("-")
  return first[:12] + dash + dirty


def losses(run: results.Run) -> list[float]:
  """Nats a token of both halves of the held-out rows."""
  return [float(nll.sum() / weight.sum())
          for nll, weight in map(run.half, (0, 1))]


def cells(found: Sequence[results.Run]) -> str:
  """A line for every cell: where a table's numbers come from."""
  out = io.StringIO()
  writer = csv.writer(out, lineterminator="\n")
  writer.writerow(["cell", "workdir", "commit", "loss_choosing_half",
                   "loss_other_half", "tokens_per_s", "together"])
  for run in found:
    writer.writerow([
        run.cell.name, f"cells/{run.cell.folder.name}", run.commit,
        *(f"{loss:.6f}" for loss in losses(run)),
        run.summary.get("tokens_per_s"), run.summary.get("together", 1)])
  return out.getvalue()


def shown(table: Sequence[Sequence[str]]) -> tuple[
    tuple[str, ...], list[list[str]]]:
  """Columns that hold something, and their cells."""
  kept = [i for i in range(len(COLUMNS)) if any(row[i] for row in table)]
  return (tuple(COLUMNS[i] for i in kept),
          [[row[i] for i in kept] for row in table])


def _interval(samples: statistics.Samples, sign: str = "") -> str:
  low, high = samples.interval()
  return f"[{low:{sign}.4f}, {high:{sign}.4f}]"


def header(study: cells_lib.Study, found: Sequence[results.Run],
           absent: Sequence[str], environment: dict[str, Any]) -> list[str]:
  """What made it, and which arms are not there: lines of text."""
  commits = sorted({_short(run.commit) for run in found})
  seconds = sum(
      r.summary["wall_seconds"] / r.summary.get("together", 1) for r in found)
  together = max(r.summary.get("together", 1) for r in found)
  return [
      f"Command: `python -m experiments.sweep --config={study.file}"
      f"{':' if study.arg else ''}{study.arg}`. Commit "
      f"{', '.join(commits)}; {environment.get('device')}; jax "
      f"{environment.get('versions', {}).get('jax')}; {len(found)} of "
      f"{len(study.cells)} cells, up "
      f"to {together} side by side, {seconds:.0f} s in all. "
      + (f"Not run: {', '.join(absent)}. " if absent else "") +
      "Loss: nats a token "
      "of the half of the held-out rows on which nothing was chosen; "
      "tok/s: of one cell, whose steps others may share; "
      "watched: how much the loss of data.watch_path rose; "
      "intervals: bootstrap over seeds and rows; p: of no difference from the "
      "baseline, for all arms together (Holm)."]


def markdown(title, lines, table, judged, pictures, text) -> str:
  """README.md of a folder of results."""
  parts = [f"# {title}", "", *lines, "", _fenced(text), ""]
  if judged:
    parts += ["## Claims", "", "| claim | verdict | numbers |", "|---|---|---|",
              *(f"| {v.text} | **{v.verdict}** | {v.numbers} |"
                for v in judged), ""]
  columns, kept = shown(table)
  parts += ["## Arms", "", f"| {' | '.join(columns)} |",
            "|" + "---|" * len(columns),
            *(f"| {' | '.join(row)} |" for row in kept), "",
            "\\* at the edge of what was tried. † has cells of another "
            "commit. ‡ some of its cells are not done.", ""]
  parts += [f"![{p.stem}]({p.name})\n" for p in pictures]
  return "\n".join(parts)


def _fenced(text: str) -> str:
  """Indented lines, which are commands, as blocks of code."""
  return re.sub(
      r"(?m)^(?: +\S.*\n?)+",
      lambda found: f"```sh\n{textwrap.dedent(found[0]).strip()}\n```\n", text)


def comma_separated(table) -> str:
  """The table for other programs."""
  out = io.StringIO()
  writer = csv.writer(out, lineterminator="\n")
  writer.writerow(COLUMNS)
  writer.writerows(table)
  return out.getvalue()


STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;
max-width:72rem;padding:0 1rem;color:#222}table{border-collapse:collapse;
font-size:.85rem;margin:1rem 0}td,th{border-bottom:1px solid #ddd;
padding:.3rem .6rem;text-align:right}td:first-child,th:first-child{
text-align:left}.held{color:#176d2e}.refuted{color:#a3151c}.undecided,
.not{color:#7a5b00}img{max-width:48%;vertical-align:top}pre{white-space:
pre-wrap;background:#f6f6f6;padding:.8rem;font-size:.85rem}code{background:
#f6f6f6}"""


def page(title, lines, table, judged, pictures, text) -> str:
  """One file with everything in it."""
  def cell(value, tag="td"):
    return f"<{tag}>{html.escape(value)}</{tag}>"

  body = [f"<h1>{html.escape(title)}</h1>"]
  body += ["<p>" + re.sub("`([^`]*)`", r"<code>\1</code>", html.escape(x))
           + "</p>" for x in lines]
  body.append(f"<pre>{html.escape(text)}</pre>")
  if judged:
    body.append("<h2>Claims</h2><table><tr><th>claim</th><th>verdict</th>"
                "<th>numbers</th></tr>")
    body += [f"<tr>{cell(v.text)}<td class='{v.verdict}'>{v.verdict}</td>"
             f"{cell(v.numbers)}</tr>" for v in judged]
    body.append("</table>")
  columns, kept = shown(table)
  body.append("<h2>Arms</h2><table><tr>" + "".join(
      cell(c, "th") for c in columns) + "</tr>")
  body += ["<tr>" + "".join(map(cell, row)) + "</tr>" for row in kept]
  body.append("</table>")
  for picture in pictures:
    data = base64.b64encode(picture.read_bytes()).decode()
    body.append(f"<img alt='{picture.stem}' "
                f"src='data:image/png;base64,{data}'>")
  return ("<!doctype html><meta charset='utf-8'><title>"
          f"{html.escape(title)}</title><style>{STYLE}</style>"
          + "\n".join(body) + "\n")


def write(
    folder: pathlib.Path, found: Sequence[results.Run], **parts: Any) -> None:
  """README.md, table.csv, cells.csv and index.html."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "cells.csv").write_text(cells(found), encoding="utf-8")
  (folder / "README.md").write_text(markdown(**parts), encoding="utf-8")
  (folder / "table.csv").write_text(
      comma_separated(parts["table"]), encoding="utf-8")
  (folder / "index.html").write_text(page(**parts), encoding="utf-8")
