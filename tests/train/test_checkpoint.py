"""Checkpoints: what is kept, what is damaged, what a kill leaves."""

from __future__ import annotations

import shutil

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import errors
from lora_jax.train import checkpoint
from lora_jax.train import loop
from lora_jax.train import step


def state(number):
  params = {"a": jnp.arange(6.0).reshape(2, 3) + number, "b": None,
            "m": jnp.float32(number)}
  return step.init_state(params).replace(step=jnp.int32(number))


@pytest.fixture(scope="module")
def three(tmp_path_factory):
  """A folder with steps 1 to 3."""
  folder = tmp_path_factory.mktemp("three") / "checkpoints"
  kept = checkpoint.Checkpoints(folder, keep=3)
  for i in (1, 2, 3):
    kept.save(i, state(i), {"step": i})
  kept.close()
  return folder


@pytest.fixture
def folder(three, tmp_path):
  return shutil.copytree(three, tmp_path / "checkpoints")


@pytest.fixture
def warnings(monkeypatch):
  found = []
  monkeypatch.setattr(
      logging, "warning", lambda text, *args: found.append(text % args))
  return found


def restored(folder):
  """(state, meta) of what a run would go on from."""
  kept = checkpoint.Checkpoints(folder)
  try:
    return kept.restore(state(0))
  finally:
    kept.close()


def check(folder, number):
  got, meta = restored(folder)
  assert meta == {"step": number}
  jax.tree.map(np.testing.assert_array_equal, got, state(number))


def test_the_newest_is_restored_to_the_bit(folder, warnings):
  check(folder, 3)
  assert not warnings


def test_nothing_to_restore(tmp_path):
  assert restored(tmp_path / "none") is None


def _largest(folder):
  return max((p for p in folder.rglob("*") if p.is_file()),
             key=lambda p: p.stat().st_size)


def _cut(path):
  data = path.read_bytes()
  path.write_bytes(data[:-2])  # Without its newline JSON is still whole.


def _flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 16
  path.write_bytes(bytes(data))


DAMAGES = {
    "cut": lambda step: _cut(_largest(step)),
    "emptied": lambda step: _largest(step).write_bytes(b""),
    "a bit flipped": lambda step: _flip(_largest(step)),
    "a file deleted": lambda step: _largest(step).unlink(),
    "a file added": lambda step: (step / "more").touch(),
    "the meta data cut": lambda step: _cut(step / "meta/metadata"),
    "the state deleted": lambda step: shutil.rmtree(step / "state"),
    "digests cut": lambda step: _cut(step.parent / "sha256/3.json"),
    "digests empty": lambda step: (
        step.parent / "sha256/3.json").write_text(""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_noticed(damage, folder, warnings):
  DAMAGES[damage](folder / "3")
  check(folder, 2)
  assert len(warnings) == 1
  assert f"{folder}/3 is damaged" in warnings[0]
  # It is kept to be looked at, and does not come back.
  assert (folder / "damaged-3").is_dir()
  check(folder, 2)
  assert len(warnings) == 1


def test_all_damaged(folder, warnings):
  for i in (1, 2, 3):
    _flip(_largest(folder / str(i)))
  assert restored(folder) is None
  assert len(warnings) == 3


def test_damaged_twice(folder, warnings):
  for _ in range(2):
    _flip(_largest(folder / "3"))
    kept = checkpoint.Checkpoints(folder, keep=3)
    kept.save(3, state(3), {"step": 3})
    kept.close()
  check(folder, 3)
  assert len(warnings) == 2
  assert {"damaged-3", "damaged-3.1"} <= {p.name for p in folder.iterdir()}


def test_what_a_kill_leaves_is_cleared(folder, warnings):
  (folder / "4.orbax-checkpoint-tmp/state").mkdir(parents=True)
  check(folder, 3)
  assert not warnings
  assert {p.name for p in folder.iterdir()} == {"1", "2", "3", "sha256"}


def test_a_step_without_digests_is_not_used_and_not_lost(folder, warnings):
  (folder / "sha256/3.json").unlink()  # A kill before they were written.
  check(folder, 2)
  assert "damaged or unfinished" in warnings[0]
  assert {p.name for p in folder.iterdir()} == {
      "1", "2", "damaged-3", "sha256"}


def test_the_newest_and_the_best_are_kept(tmp_path):
  kept = checkpoint.Checkpoints(tmp_path, keep=2)
  for i in range(1, 6):
    kept.save(i, state(i), {"step": i}, best_step=min(i, 2))
  assert kept.steps() == [2, 4, 5]
  kept.save(6, state(6), {"step": 6}, best_step=6)
  assert kept.steps() == [5, 6]
  kept.close()
  assert {p.stem for p in (tmp_path / "sha256").iterdir()} == {"5", "6"}


def test_a_failed_write_is_one_line(folder, monkeypatch):
  kept = checkpoint.Checkpoints(folder, keep=3)

  def fail(*unused, **options):
    raise OSError("first line\nsecond line")

  monkeypatch.setattr(kept._manager, "save", fail)
  with pytest.raises(errors.UserError, match=r"step 4.*first line; free") as e:
    kept.save(4, state(4), {"step": 4})
  assert "second" not in str(e.value)
  kept.close()
  check(folder, 3)


def test_progress_is_a_json_value():
  progress = loop.Progress(step=3, tokens=5, samples={"0": ["x"]})
  assert progress.meta()["best_loss"] is None
  assert loop.Progress.from_meta(progress.meta()) == progress
  best = loop.Progress(step=3, best_step=2, best_loss=1.25)
  assert loop.Progress.from_meta(best.meta()) == best
