"""A work directory runs again to the same bits, or says what is other."""

from __future__ import annotations

import json
import shutil

import pytest

from experiments import reproduce
from lora_jax import errors
from tests.experiments import conftest


@pytest.fixture(scope="module")
def done(run_command, tmp_path_factory):
  """A run of rows of its own, which may be changed."""
  folder = tmp_path_factory.mktemp("reproduce")
  rows = conftest.write_rows(folder / "rows.jsonl", conftest.messages(24))
  found = run_command(
      folder / "run", data__path=rows, adapter__dropout=0.3,
      train__eval_every=2)
  assert found.code == 0, found.err
  return folder


def again(run_command, old, new):
  process = run_command.server.start(
      [f"--reproduce={old}", f"--workdir={new}"], conftest.ROOT,
      run_command.logs / "out", run_command.logs / "err")
  return run_command.end(process)


def test_the_same_bits_come_out_again(done, run_command, tmp_path):
  found = again(run_command, done / "run", tmp_path / "new")
  assert found.code == 0, found.err
  # Before the first step, and after each of four.
  assert "reproduced: 5 steps, bit for bit" in found.out
  assert conftest.tensors(done / "run") == conftest.tensors(tmp_path / "new")
  a, b = (json.loads((f / "inputs.json").read_text())
          for f in (done / "run", tmp_path / "new"))
  assert a == b and set(a) == {"base", "rows", "held_out"}


# A run more; what is compared is told by hand below.
@pytest.mark.slow
def test_other_rows_are_named(done, run_command, tmp_path):
  rows = done / "rows.jsonl"
  text = rows.read_text()
  rows.write_text(text.replace("x", "y"))
  try:
    found = again(run_command, done / "run", tmp_path / "new")
  finally:
    rows.write_text(text)
  assert found.code == 1 and len(found.errors) == 1
  assert "is not reproduced: eval_loss of step 0 is" in found.errors[0]
  assert "the rows (" in found.errors[0]
  assert "the base's weights" not in found.errors[0]


@pytest.fixture
def pair(done, tmp_path):
  """Two folders of the same run, to change."""
  for name in ("a", "b"):
    (tmp_path / name).mkdir()
    for file in ("config.json", "environment.json", "inputs.json",
                 "metrics.jsonl"):
      shutil.copy(done / "run" / file, tmp_path / name / file)
  return tmp_path / "a", tmp_path / "b"


def change(path, edit):
  value = json.loads(path.read_text())
  edit(value)
  path.write_text(json.dumps(value))


def off_by(folder, factor, step=3):
  lines = [json.loads(x) for x in
           (folder / "metrics.jsonl").read_text().splitlines()]
  for line in lines:
    if line["step"] >= step and "loss" in line:
      line["loss"] *= factor
  (folder / "metrics.jsonl").write_text(
      "".join(json.dumps(x) + "\n" for x in lines))


def test_one_bit_is_too_many_on_the_same_machine(pair):
  old, new = pair
  assert reproduce.compare(old, new).same
  off_by(new, 1 + 1e-9)
  found = reproduce.compare(old, new)
  assert not found.same and "loss of step 3 is" in found.text
  assert "nothing else is seen to differ" in found.text


def test_elsewhere_losses_may_differ_a_little(pair):
  old, new = pair
  off_by(new, 1 + 5e-4)
  change(new / "environment.json", lambda e: e["versions"].update(jax="9"))
  found = reproduce.compare(old, new)
  assert found.same and "within 0.0005" in found.text
  assert "jax " in found.text and "-> 9" in found.text
  off_by(new, 1.01)
  found = reproduce.compare(old, new)
  assert not found.same and "wanted: losses within 0.001" in found.text


def test_a_gpu_has_the_same_bits_only_if_asked(pair):
  old, new = pair
  off_by(new, 1 + 1e-6)
  for folder in pair:
    change(folder / "environment.json", lambda e: e.update(backend="gpu"))
  found = reproduce.compare(old, new)
  assert found.same and "compute.deterministic is off" in found.text
  for folder in pair:
    change(folder / "config.json",
           lambda c: c["compute"].update(deterministic=True))
  assert not reproduce.compare(old, new).same


def test_what_is_missing_is_named(pair, tmp_path):
  old, new = pair
  text = (new / "metrics.jsonl").read_text().splitlines()
  (new / "metrics.jsonl").write_text("\n".join(text[:-2]) + "\n")
  assert "is missing in" in reproduce.compare(old, new).text
  with pytest.raises(errors.UserError, match=r"no config\.json"):
    reproduce.start(tmp_path)
