"""A sink that fails, hangs or falls behind never touches the run."""

from __future__ import annotations

import json
import threading
import time
import types as python_types

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import errors
from lora_jax import types
from lora_jax.train import checkpoint
from lora_jax.train import loop
from lora_jax.train import optim
from lora_jax.train import sinks
from lora_jax.train import step as step_lib
from lora_jax.train.sinks import fan

HOOKS = ("start", "scalars", "text", "finish")
RECORDER = sinks.LogConfig(sinks="recorder")


class Recorder:
  """A sink that notes its calls and fails in one of them."""

  fails: str | None = None
  calls: list

  def __init__(self, log):
    self.log = log

  def __getattr__(self, name):
    if name not in HOOKS:
      raise AttributeError(name)

    def hook(*args):
      type(self).calls.append((name, *args))
      if name == type(self).fails:
        raise OSError("the disk is full\nand more")

    return hook


@pytest.fixture
def recorder(monkeypatch):
  """A registered sink class, fresh for each test."""
  kind = type("Fresh", (Recorder,), {"calls": [], "fails": None})
  monkeypatch.setitem(fan.registry.SINKS, "recorder", kind)
  return kind


@pytest.fixture
def warned(monkeypatch):
  found = []
  monkeypatch.setattr(
      logging, "warning", lambda text, *args: found.append(text % args))
  return found


class Batches:
  """The loop's view of a data set."""

  def batch(self, step):
    del step
    flat = np.ones((1, 1, 4), np.int32)
    return types.Batch(
        tokens=flat, targets=flat, positions=flat, segment_ids=flat,
        example_ids=flat, loss_weights=flat.astype(np.float32))

  def row_indices(self, step):
    return np.array([step])


def _step(state, frozen, base, batch, hyper, key, *, model, settings):
  """Instead of a model: the loss is a function of the step."""
  del frozen, base, batch, hyper, key, model, settings
  number = int(state.step) + 1
  return state.replace(step=jnp.int32(number)), {
      "loss": np.float32(1 / number), "grad_norm": np.float32(number),
      "tokens": np.int32(4), "finite": np.bool_(True)}


def fit(folder, log=None, steps=4, *, monkeypatch):
  """`loop.fit` with all that a sink can be told."""
  monkeypatch.setattr(step_lib, "train_step", _step)

  def evaluate(params, base):
    del params, base
    return python_types.SimpleNamespace(
        loss=1.5, perplexity=7.0,
        nll=np.ones(2), weight=np.ones(2))

  folder.mkdir(exist_ok=True)
  config = {"train": {"steps": steps}, "seed": 3}
  with sinks.Sinks(log, config) as fanned:
    task = loop.Task(
        model=None, base=None, frozen=None, batches=Batches(),
        learning_rates=np.full(steps, 0.5, np.float32),
        optim=optim.OptimConfig(), settings=step_lib.Settings(),
        key=jax.random.key(0), evaluate=evaluate,
        sample=lambda params, base: ["one", "two"], sinks=fanned)
    outcome = loop.fit(
        task, step_lib.init_state({"w": jnp.ones(2)}),
        loop.TrainConfig(steps=steps, eval_every=2, checkpoint_every=2),
        folder)
    fanned.finish({"steps": steps, "loss": 0.25})
  return outcome


def lines(folder):
  """metrics.jsonl without the speeds."""
  text = (folder / "metrics.jsonl").read_text().splitlines()
  return [{k: v for k, v in json.loads(x).items() if k != "tokens_per_s"}
          for x in text]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
  """Metrics of a run without sinks."""
  with pytest.MonkeyPatch.context() as patch:
    folder = tmp_path_factory.mktemp("plain") / "run"
    fit(folder, monkeypatch=patch)
  assert not (folder / "sinks").exists()
  return lines(folder)


def test_a_sink_hears_everything(recorder, plain, tmp_path, monkeypatch):
  fit(tmp_path / "run", RECORDER, monkeypatch=monkeypatch)
  assert recorder.calls[0] == (
      "start", {"train": {"steps": 4}, "seed": 3}, tmp_path / "run", -1)
  heard = [{"step": step, **values}
           for name, step, *(values,) in recorder.calls[1:-1]
           if name == "scalars"]
  for values in heard:
    values.pop("tokens_per_s", None)
  assert heard == plain == lines(tmp_path / "run")
  assert [x["step"] for x in heard] == [0, 1, 2, 2, 3, 4, 4]
  texts = [c for c in recorder.calls if c[0] == "text"]
  assert texts == [("text", s, ["one", "two"]) for s in (0, 4)]
  assert recorder.calls[-1] == ("finish", {"steps": 4, "loss": 0.25})


@pytest.mark.parametrize("hook", HOOKS)
def test_a_failing_hook_costs_one_warning(
    hook, recorder, warned, plain, tmp_path, monkeypatch):
  recorder.fails = hook
  outcome = fit(tmp_path / "run", RECORDER, monkeypatch=monkeypatch)
  assert lines(tmp_path / "run") == plain
  assert outcome.progress.step == 4
  assert len(warned) == 1
  assert "recorder is dropped (OSError: the disk is full);" in warned[0]
  assert [c[0] for c in recorder.calls].count(hook) == 1
  assert recorder.calls[-1][0] == hook  # Nothing after it.


def test_a_missing_package_costs_one_warning(
    recorder, warned, plain, tmp_path, monkeypatch):
  for package in ("tensorboardX", "wandb", "mlflow"):
    monkeypatch.setitem(__import__("sys").modules, package, None)
  fit(tmp_path / "run",
      sinks.LogConfig(sinks="tensorboard,wandb,mlflow,recorder"),
      monkeypatch=monkeypatch)
  assert lines(tmp_path / "run") == plain
  assert len(warned) == 3 and all("Error: " in x for x in warned)
  assert recorder.calls[-1][0] == "finish"  # The one that works still does.


def test_a_sink_that_hangs_is_left_behind(recorder, warned, tmp_path):
  hangs = threading.Event()
  recorder.start = lambda self, *args: hangs.wait(60)
  began = time.monotonic()
  with sinks.Sinks(sinks.LogConfig(sinks="recorder", timeout=0.2)) as fanned:
    fanned.start(tmp_path, -1)
    fanned.scalars(1, {"loss": 1.0})
  assert time.monotonic() - began < 10
  assert len(warned) == 1 and "log.timeout=0.2" in warned[0]
  hangs.set()


def test_a_sink_that_is_slow_is_dropped(
    recorder, warned, tmp_path, monkeypatch):
  monkeypatch.setattr(fan, "CAPACITY", 3)
  hangs = threading.Event()
  recorder.start = lambda self, *args: hangs.wait(60)
  with sinks.Sinks(sinks.LogConfig(sinks="recorder", timeout=0)) as fanned:
    fanned.start(tmp_path, -1)
    for i in range(9):
      fanned.scalars(i, {"loss": 1.0})
    assert len(warned) == 1 and "3 records behind" in warned[0]
    hangs.set()
  assert len(warned) == 1


def test_a_failed_run_has_no_summary(recorder, tmp_path):
  with pytest.raises(ZeroDivisionError), sinks.Sinks(
      sinks.LogConfig(sinks="recorder")) as fanned:
    fanned.start(tmp_path, -1)
    raise ZeroDivisionError
  assert recorder.calls[-1] == ("finish", None)


def test_only_the_first_process_writes(recorder, tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  with sinks.Sinks(sinks.LogConfig(sinks="recorder")) as fanned:
    fanned.start(tmp_path, -1)
    fanned.scalars(1, {"loss": 1.0})
  assert not recorder.calls


@pytest.mark.parametrize("fields, message", [
    (dict(sinks="tensorboard,wand"), 'log.sinks="wand".*mean "wandb"'),
    (dict(wandb_mode="ofline"), 'log.wandb_mode="ofline".*mean "offline"'),
    (dict(timeout=-1.0), r"log.timeout=-1.0 is out of range"),
])
def test_bad_values(fields, message):
  with pytest.raises(errors.UsageError, match=message):
    sinks.LogConfig(**fields).validate()


def test_names():
  log = sinks.LogConfig(sinks=" wandb,,tensorboard,wandb")
  assert log.names == ("wandb", "tensorboard")


def killed_then_resumed(folder, log, monkeypatch):
  """Six logged steps, a kill, and the rest from the checkpoint of step 4."""
  saved = checkpoint.Checkpoints.save

  class Killed(BaseException):
    pass

  def save(self, number, *args):
    if number == 6:
      raise Killed
    saved(self, number, *args)

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.Checkpoints, "save", save)
    with pytest.raises(Killed):
      fit(folder, log, steps=8, monkeypatch=patch)
  fit(folder, log, steps=8, monkeypatch=monkeypatch)
