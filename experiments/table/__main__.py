"""Tables, plots and verdicts of a sweep.

  python -m experiments.table --workdir=runs/sweeps/rank
  python -m experiments.table --workdir=runs/sweeps/rank \\
      --output=docs/results/rank
  python -m experiments.table --workdir=runs/sweeps/rank \\
      --against=docs/results/rank

Writes README.md, table.csv, cells.csv (every run), index.html (one file with
everything in it) and the plots, by default into the sweep's folder `table`.
--against says how far that is from results of the same study.
"""

from __future__ import annotations

import ast
from collections import Counter
import pathlib

from absl import flags

from experiments import cli
from experiments.table import against
from experiments.table import page
from experiments.table import plots
from experiments.table import results
from experiments.table import verdicts
from lora_jax import errors
from lora_jax.train import workdir as workdir_lib


def make(
    folder: pathlib.Path, output: pathlib.Path, mix: bool = False,
    other: pathlib.Path | None = None,
) -> list[verdicts.Verdict]:
  """Everything that is made of a sweep.

  Args:
    folder: of the sweep.
    output: where it goes.
    mix: whether cells may be of different commits.
    other: results of the same study, to compare with.

  Raises:
    errors.UserError: if no cell is done, or they are of different commits.
  """
  study = results.folder_study(folder)
  found = results.runs(study.cells)
  if not found:
    raise errors.UserError(
        f"{folder}: none of its {len(study.cells)} cells is done; run "
        "experiments.sweep")
  results.check_commits(found, mix)
  parts = results.parts(study)
  arms = results.arms(found, parts.tuned, study.cells)
  baseline = (results.arm_of(arms, parts.baseline)
              if parts.baseline else None) or arms[0]
  judged = verdicts.judge(study.claims, arms)
  commit = Counter(run.commit for run in found).most_common(1)[0][0]
  output.mkdir(parents=True, exist_ok=True)
  environment = workdir_lib.read_json(
      found[0].cell.folder / "environment.json") or {}
  text = ast.get_docstring(ast.parse(study.file.read_text())) or study.name
  title, _, text = text.partition("\n")
  page.write(
      output, found, title=title, lines=page.header(
          study, found, results.absent(study.cells, parts.tuned, arms),
          environment),
      table=page.rows(arms, baseline, commit), judged=judged,
      pictures=plots.draw(arms, found, baseline, output), text=text.strip("\n"))
  left = len(study.cells) - len(found)
  for one in judged:
    print(f"{one.verdict:10} {one.text}: {one.numbers}")
  print(f"{output}/README.md, table.csv, index.html: {len(arms)} arms of "
        f"{len(found)} cells"
        + (f"; {left} cells are not done" if left else ""))
  if other is not None:
    print("\n".join(against.compare(other, found, arms, judged)))
  return judged


def main() -> None:
  values = flags.FLAGS
  if values.workdir is None:
    raise errors.UsageError("--workdir is missing; give that of a sweep")
  folder = pathlib.Path(values.workdir)
  output = pathlib.Path(values.output) if values.output else folder / "table"
  other = pathlib.Path(values.against) if values.against else None
  make(folder, output, values.mix, other)


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "Of a sweep.")
  flags.DEFINE_string("output", None, "Where; the sweep's folder by default.")
  flags.DEFINE_string(
      "against", None, "A folder of results of the same study to compare with.")
  flags.DEFINE_bool("mix", False, "Take cells of different commits together.")
  cli.run(main)
