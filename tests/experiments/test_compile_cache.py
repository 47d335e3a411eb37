"""Compiled programs are kept between commands, and change no result."""

from __future__ import annotations

import os

from absl import logging
import jax
import pytest

from experiments import cli
from tests.experiments import conftest

NAMES = ("jax_compilation_cache_dir", "jax_compilation_cache_max_size",
         "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture
def config(monkeypatch):
  """What is set, without setting it."""
  for name in NAMES:
    monkeypatch.delenv(name.upper(), raising=False)
  found: dict = {}
  monkeypatch.setattr(jax.config, "update", found.__setitem__)
  return found


def test_a_folder_by_threads(config, monkeypatch, tmp_path):
  monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path))
  cli.cache_compilations()
  threads = len(os.sched_getaffinity(0))
  assert config == {
      NAMES[0]: str(tmp_path / f"xla/cpu-{threads}"), NAMES[1]: 2 * 2**30,
      NAMES[2]: 0.2}


def test_the_environment_goes_first(config, monkeypatch, tmp_path):
  monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path))
  monkeypatch.setenv(NAMES[0].upper(), "")
  monkeypatch.setenv(NAMES[1].upper(), "5")
  cli.cache_compilations()
  assert set(config) == {NAMES[2]}


def test_an_unwritable_folder_is_no_failure(config, monkeypatch, tmp_path):
  (tmp_path / "file").touch()
  monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "file"))
  notes = []
  monkeypatch.setattr(
      logging, "debug", lambda text, *args: notes.append(text % args))
  cli.cache_compilations()
  assert not config
  (note,) = notes
  assert f"{tmp_path}/file/xla" in note


# Two runs in processes of their own, without the tests' cache.
@pytest.mark.slow
def test_the_second_run_compiles_nothing_and_ends_alike(
    run_command, monkeypatch, tmp_path):
  monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "cache"))
  for name in NAMES:
    monkeypatch.delenv(name.upper(), raising=False)
  # Of some, compiling takes now more and now less than the default.
  monkeypatch.setenv(NAMES[2].upper(), "0")
  kept = []
  for name in ("cold", "warm"):
    done = conftest.from_shell(run_command.argv(
        tmp_path / name, train__steps=2, data__eval_rows=0))
    assert done.code == 0, done.err
    assert not done.err
    kept.append({p.name for p in (tmp_path / "cache/xla").rglob("*-cache")})
  assert any("jit_train_step" in name for name in kept[0])
  assert kept[0] == kept[1]
  assert (conftest.tensors(tmp_path / "cold")
          == conftest.tensors(tmp_path / "warm"))
  losses = [[x["loss"] for x in conftest.metrics(tmp_path / name)]
            for name in ("cold", "warm")]
  assert losses[0] == losses[1]
