"""Every study of configs/studies/: its cells are configs, its claims arms."""

from __future__ import annotations

import ast
import pathlib

import pytest

from experiments import blocks
from experiments.sweep import cells as cells_lib
from experiments.sweep import together
from experiments.table import results
from experiments.table import verdicts

STUDIES = sorted(
    p for p in pathlib.Path("configs/studies").glob("*.py")
    if p.stem != "__init__")


@pytest.mark.parametrize("arg", ["", "runlocal"])
@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_a_study_can_be_run_and_judged(path, arg, tmp_path):
  study = cells_lib.study(f"{path}:{arg}" if arg else str(path), tmp_path)
  assert len(study.cells) > 1
  for cell in study.cells:
    blocks.check(cell.config)
  groups = together.plan(study.cells, 8)
  assert sum(map(len, groups)) == len(study.cells)
  # Claims are about arms that there are, one each.
  parts = results.parts(study)
  tuned = parts.tuned
  arms = {cells_lib.names([own])[0]: own for own in (
      {k: v for k, v in cell.overrides.items()
       if k != "seed" and k not in tuned} for cell in study.cells)}
  for claim in study.claims:
    assert claim["kind"] in verdicts.RULES
    for side in {"arm", "than"} & set(claim):
      fitting = [own for own in arms.values()
                 if all(own.get(k) == v for k, v in claim[side].items())]
      exact = [own for own in fitting if own == claim[side]]
      assert len(exact or fitting) == 1, claim
  if arg == "runlocal":  # Minutes on a laptop.
    assert sum(c.config["train"]["steps"] for c in study.cells) <= 60


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_a_study_says_what_was_published_and_predicted(path):
  text = ast.get_docstring(ast.parse(path.read_text()))
  for part in ("Published:", "Prediction:", "Verdict:", ":runlocal"):
    assert part in text
